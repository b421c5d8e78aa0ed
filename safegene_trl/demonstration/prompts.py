"""The prompts that the page offers: a fixed list, harmless in what they ask for. It takes no others."""

import json
from dataclasses import dataclass
from importlib.resources import files

from ..data.prompts import Prompt


KINDS = {
    "ordinary": "ordinary",
    "harmful_words": "harmless, in harmful-sounding words",
    "doubtful": "mildly doubtful, and harms nobody",
}
_SET = "demonstration"


@dataclass(frozen=True)
class Offered:
    """A prompt of the list.

    Attributes:
        kind: One of `KINDS`.
        text: The prompt.
    """

    kind: str
    text: str

    @property
    def asked(self) -> Prompt:
        """The prompt as models are asked it."""
        return Prompt(_SET, "benign", self.kind, ({"role": "user", "content": self.text},))


def offered() -> dict[str, Offered]:
    """The list, by the prompts' texts."""
    text = files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["prompt"]: Offered(row["kind"], row["prompt"]) for row in rows}
