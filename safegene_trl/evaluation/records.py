"""What an evaluation keeps in its folder: answers, and verdicts that are bound to the very answer
they were about.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.write_errors import writing
from ..data.prompts import Prompt
from ..errors import OutputError, SafeGeneError
from ..judges import Exchange, Judge, Label, Verdict, judged
from ..models.reasoning import Reply
from ..provenance import sha256_of_json
from ..text import one_line, strict_json
from .folder import GENERATIONS, RESULT, SETTINGS, VERDICTS
from .json_lines import append_lines, read_lines


_OTHER_RUN = "choose another `output_dir`, or delete that folder"


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """By prompt key: the rows of answers that a folder holds.

    Raises:
        OutputError: A line is damaged, or of another version.
    """
    rows = read_lines(folder / GENERATIONS)
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(key), str) for key in ("key", "answer", "run")):
            raise OutputError(
                f"Answer {number} in {folder / GENERATIONS} is of another version: {_OTHER_RUN}."
            )
    return {row["key"]: row for row in rows}


def reply_of(row: Mapping[str, Any]) -> Reply:
    """The reply that a row of answers holds."""
    return Reply(row["answer"], row.get("reasoning"), row.get("finished", True) is True)


class Records:
    """The folder of one evaluation.

    Args:
        folder: Where it is.
        settings: Model, decoding and versions. All but the versions say which run an answer or
            verdict belongs to.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, dict(settings)
        self._deciding = {key: value for key, value in settings.items() if key != "software"}
        self.run = sha256_of_json(self._deciding)

    def check(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises `OutputError` if the folder holds answers or verdicts of another model or of other
        settings.
        """
        rows = [*answers.values(), *read_lines(self.folder / VERDICTS)]
        if not rows:
            return
        try:
            earlier = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            changed = [key for key, value in self._deciding.items() if earlier.get(key) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise OutputError(
                f"{self.folder} holds answers or verdicts without their settings: choose another `output_dir`."
            ) from error
        if changed:
            older = "" if changed[0] in earlier else ", as of an older version"
            raise OutputError(
                f"{self.folder} holds answers of a run with another `{changed[0]}`{older}: {_OTHER_RUN}."
            )
        if any(row.get("run") != self.run for row in rows):
            raise OutputError(
                f"{self.folder} holds answers or verdicts of another run: {_OTHER_RUN}."
            )

    def begin(self) -> None:
        """Writes the settings, before the first answer; numbers of an earlier run go."""
        with writing(), suppress(FileNotFoundError):
            (self.folder / RESULT).unlink()
        replace_file(self.folder / SETTINGS, strict_json(self.settings) + "\n")

    def add_answers(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> None:
        """Keeps a batch of answers, each with its reasoning where there is one."""
        rows = [
            {"key": prompt.key, **asdict(prompt), **_kept(reply), "run": self.run}
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        append_lines(self.folder / GENERATIONS, rows)

    def verdicts(
        self,
        judge: Judge,
        prompts: Sequence[Prompt],
        replies: Sequence[Reply],
        labels: Sequence[str],
    ) -> list[Verdict]:
        """What the judge said before of these very answers, and its verdicts on the rest; kept as
        they come.

        Raises:
            SafeGeneError: The judge failed, or the file of verdicts is damaged or cannot be
                written.
        """
        about = sha256_of_json([judge.describe(), sorted(labels)])[:16]
        names = [
            self._name(judge, about, prompt, reply.answer)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        known = dict(self._known())
        rest = [i for i, name in enumerate(names) if name not in known]
        for start in range(0, len(rest), judge.batch):
            part = rest[start : start + judge.batch]
            exchanges = [
                Exchange(prompts[i].text, replies[i].answer, tuple(labels), replies[i].finished)
                for i in part
            ]
            found = {
                names[i]: verdict for i, verdict in zip(part, asked(judge, exchanges), strict=True)
            }
            rows = [
                dict(zip(_NAME, name, strict=True)) | asdict(verdict)
                for name, verdict in found.items()
            ]
            append_lines(self.folder / VERDICTS, rows)
            known |= found
        return [known[name] for name in names]

    def _name(self, judge: Judge, about: str, prompt: Prompt, answer: str) -> tuple[str, ...]:
        return prompt.key, judge.name, about, self.run, sha256_of_json([prompt.text, answer])

    def _known(self) -> Iterator[tuple[tuple[str, ...], Verdict]]:
        for number, row in enumerate(read_lines(self.folder / VERDICTS), start=1):
            name = tuple(row.get(key) for key in _NAME)
            score = row.get("score")
            numeric = (
                isinstance(score, int | float)
                and not isinstance(score, bool)
                and math.isfinite(score)
            )
            if not (
                all(isinstance(part, str) for part in name) and row.get("label") in get_args(Label)
            ) or not (score is None or numeric):
                raise OutputError(
                    f"Verdict {number} in {self.folder / VERDICTS} is of another version: {_OTHER_RUN}."
                )
            yield tuple(map(str, name)), Verdict(row["label"], score)


def _kept(reply: Reply) -> dict[str, Any]:
    """What a row has of a reply: of one without reasoning only the answer."""
    return asdict(reply) if reply.reasoning is not None else {"answer": reply.answer}


_NAME = ("key", "judge", "about", "run", "answer")  # what a verdict is bound to


def asked(judge: Judge, exchanges: Sequence[Exchange]) -> list[Verdict]:
    try:
        return judged(judge, exchanges)
    except SafeGeneError:
        raise
    except Exception as error:  # of a model, a server's client or another package: whatever it is, the verdicts so far are kept
        raise SafeGeneError(
            f"The judge {judge.name} failed ({type(error).__name__}: {one_line(error)[:300]}): the verdicts given before are kept; set that "
            "right or leave the judge out, then run again."
        ) from error
