"""What judges say of answers, kept as they come; the answers themselves are never written.

An audit asks models for answers that may be harmful. So each batch is judged as soon as it is there,
and only its labels stay. What it costs: another judge means asking the models again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..distributed.layouts import Sharding
from ..errors import OutputError
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluate import generated
from ..evaluation.json_lines import append_lines, read_lines
from ..evaluation.records import asked
from ..judges import Exchange, Judge, Label
from ..provenance import sha256_of_json


LABELS = "labels.jsonl"
Found = dict[str, str]  # by judge


class Labels:
    """The file of labels in an audit's folder.

    Args:
        folder: Where it is.
        judges: Who is asked.
        labels: Words that are a classifier's label as an answer.

    Attributes:
        runs: By role, which answers its labels are of.
    """

    def __init__(self, folder: Path, judges: Sequence[Judge], labels: Sequence[str]):
        self._file, self._judges, self._labels = folder / LABELS, judges, tuple(labels)
        self._known = self._read()
        self.runs: dict[str, str] = {}

    def _read(self) -> dict[tuple[str, str], Found]:
        known: dict[tuple[str, str], Found] = {}
        for number, row in enumerate(read_lines(self._file), start=1):
            found = row.get("labels")
            sound = isinstance(found, dict) and all(
                isinstance(judge, str) and label in get_args(Label)
                for judge, label in found.items()
            )
            if not (sound and isinstance(row.get("run"), str) and isinstance(row.get("key"), str)):
                raise OutputError(
                    f"Line {number} of {self._file} is of another version: choose another `output_dir`, or delete that folder."
                )
            known[row["run"], row["key"]] = dict(found or {})
        return known

    def begin(self, role: str, settings: Mapping[str, Any]) -> None:
        """Names the answers of a role by all that decides them, judges included."""
        judges = [judge.describe() | {"name": judge.name} for judge in self._judges]
        self.runs[role] = sha256_of_json([settings, judges, sorted(self._labels)])

    def missing(self, role: str, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose answers have no labels yet."""
        run, judges = self.runs[role], {judge.name for judge in self._judges}
        known = {
            key for (own, key), found in self._known.items() if own == run and judges <= set(found)
        }
        return [prompt for prompt in prompts if prompt.key not in known]

    def ask(
        self,
        role: str,
        prompts: Sequence[Prompt],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        sharding: Sharding,
    ) -> None:
        """Asks the model what is missing, as it is now, and keeps the labels of its answers.

        Raises:
            SafeGeneError: The device is too small, a judge failed, or the file cannot be written.
        """
        run = self.runs[role]
        missing = self.missing(role, prompts)
        for part, replies in generated(model, tokenizer, missing, config, sharding):
            exchanges = [
                Exchange(prompt.text, reply.answer, self._labels, reply.finished)
                for prompt, reply in zip(part, replies, strict=True)
            ]
            verdicts = {judge.name: asked(judge, exchanges) for judge in self._judges}
            found: dict[tuple[str, str], Found] = {
                (run, prompt.key): {name: own[i].label for name, own in verdicts.items()}
                for i, prompt in enumerate(part)
            }
            append_lines(
                self._file,
                [{"run": run, "key": key, "labels": own} for (_, key), own in found.items()],
            )
            self._known |= found

    def of(self, role: str, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
        """By judge: the labels of the answers of a role, in the order of the prompts."""
        rows = [self._known[self.runs[role], prompt.key] for prompt in prompts]
        return {judge.name: [row[judge.name] for row in rows] for judge in self._judges}
