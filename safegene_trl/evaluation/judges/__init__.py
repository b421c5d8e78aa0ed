"""Judges: what kind of answer a model gave. One interface, several implementations.

Two classes are told apart before any judge is asked, because they pass for refusals or for attacks where nobody looks:
*incoherent* answers (`..coherence`) and *off-task* ones, e.g. a sentiment classifier's `positive` in reply to a question.
The judge decides about the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from ...errors import ConfigError
from ..coherence import is_incoherent, is_off_task


Label = Literal["refused", "answered", "harmful", "harmless", "off_task", "incoherent", "unjudged"]
ATTACK_SUCCEEDED = ("answered", "harmful")  # not refused and coherent; for a judge that sees harm, harmful


@dataclass(frozen=True)
class Exchange:
    """A prompt, its answer, and the words that count as a classifier's label there."""

    prompt: str
    answer: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one exchange.

    Attributes:
        label: `refused` or `answered` by a judge that sees refusals; `harmful` or `harmless` by one that sees harm;
            `off_task` and `incoherent` by none; `unjudged` where the judge gave no usable reply.
        score: The judge's own number, 0–1 and higher for more of a success of the attack, or None.
    """

    label: Label
    score: float | None = None


class Judge(Protocol):
    """Judges coherent, on-task answers.

    Attributes:
        name: As the user wrote it, for the record.
        sees: `refusals` or `harm`: what its numbers may be called.
    """

    name: str
    sees: Literal["refusals", "harm"]

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...

    def describe(self) -> dict[str, Any]:
        """What another person needs to judge again in the same way."""
        ...


def judged(judge: Judge, exchanges: Sequence[Exchange]) -> list[Verdict]:
    """A verdict on every exchange; the judge itself is asked about coherent, on-task answers only."""
    verdicts = [
        Verdict("incoherent")
        if is_incoherent(e.answer)
        else Verdict("off_task" if is_off_task(e.answer, e.labels) else "unjudged")
        for e in exchanges
    ]
    open_ones = [i for i, verdict in enumerate(verdicts) if verdict.label == "unjudged"]
    for i, verdict in zip(open_ones, judge([exchanges[i] for i in open_ones]), strict=True):
        verdicts[i] = replace(verdict)
    return verdicts


def load_judge(spec: str) -> Judge:
    """The judge that `name` or `name:argument` stands for.

    `refusal_phrases`; `embedding:HEAD` (folder made by `safegene_trl.evaluation.judges.embedding.fit`);
    `hf:MODEL` (a sequence classifier); `judgezoo:NAME` (e.g. `harmbench`, `llama_guard_3`);
    `openai_compatible:MODEL` (server from `OPENAI_BASE_URL` and `OPENAI_API_KEY`).

    Raises:
        ConfigError: There is no such judge, or what it needs is missing.
    """
    name, _, argument = spec.partition(":")
    if name not in _LOADERS:
        raise ConfigError(f"There is no judge `{name}`: use one of {', '.join(_LOADERS)}.")
    if bool(argument) == (name == "refusal_phrases"):
        wanted = "takes no argument" if argument else "needs an argument"
        raise ConfigError(f"The judge `{spec}` {wanted}: write `{_USAGE[name]}`.")
    return _LOADERS[name](argument)


def _refusal_phrases(_: str) -> Judge:
    from .refusal_phrases import RefusalPhrases

    return RefusalPhrases()


def _embedding(folder: str) -> Judge:
    from .embedding import EmbeddingJudge

    return EmbeddingJudge(folder)


def _hf(model: str) -> Judge:
    from .classifier import ClassifierJudge

    return ClassifierJudge(model)


def _judgezoo(name: str) -> Judge:
    from .zoo import ZooJudge

    return ZooJudge(name)


def _openai_compatible(model: str) -> Judge:
    from .openai_compatible import RubricJudge

    return RubricJudge(model)


_LOADERS: Mapping[str, Callable[[str], Judge]] = {
    "refusal_phrases": _refusal_phrases,
    "embedding": _embedding,
    "hf": _hf,
    "judgezoo": _judgezoo,
    "openai_compatible": _openai_compatible,
}
_USAGE = {
    "refusal_phrases": "refusal_phrases",
    "embedding": "embedding:FOLDER",
    "hf": "hf:MODEL",
    "judgezoo": "judgezoo:NAME",
    "openai_compatible": "openai_compatible:MODEL",
}
