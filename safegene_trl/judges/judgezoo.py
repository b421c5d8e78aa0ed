"""The judges of the package `judgezoo` (HarmBench's classifier, Llama Guard, StrongREJECT's
fine-tuned judge and others).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..errors import ConfigError
from . import THRESHOLD, Exchange, Verdict, verdict_of_share


class ZooJudge:
    """One judge of `judgezoo`, by the name it has there."""

    sees: Literal["refusals", "harm"] = "harm"
    batch = 1

    def __init__(self, zoo_name: str):
        try:
            import judgezoo
        except ImportError as error:
            raise ConfigError(
                "Judges of `judgezoo` need it: pip install 'safegene-trl[judges]'."
            ) from error
        self.name = f"judgezoo:{zoo_name}"
        self._version = judgezoo.__version__
        try:
            self._judge = judgezoo.Judge.from_name(zoo_name)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"The judge `{zoo_name}` of judgezoo cannot be loaded: {error}"
            ) from error

    @torch.no_grad()
    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        verdicts = []
        for exchange in exchanges:  # one by one: a reply that it cannot parse shortens its list
            chat = [
                {"role": "user", "content": exchange.prompt},
                {"role": "assistant", "content": exchange.answer},
            ]
            scores = self._judge.judge([chat]).get("p_harmful", [])
            verdicts.append(verdict_of_share(scores[0] if scores else None, self.sees))
        return verdicts

    def describe(self) -> dict[str, Any]:
        return {"judgezoo": self._version, "threshold": THRESHOLD}
