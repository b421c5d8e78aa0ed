"""What the report in a safeguarded folder says of the models it came from: where they were, and by
which hashes they are known again.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.contents import MARKER
from ..checkpoints.source import adapter_base
from ..errors import ConfigError, UnsupportedModelError, VectorError
from ..provenance import model_reference, same_weights
from ..text import printable, read_json
from ..vectors.files import CONFIG_FILE
from ..vectors.safety_vector import SafetyVector


@dataclass(frozen=True)
class Release:
    """A safeguarded folder.

    Attributes:
        folder: Where it is.
        vector: The vector's place as the safety step was given it.
        vector_revision: Its revision on the hub.
        fine_tune: The fine-tune's place; empty where it was in memory only.
        base: The reference of the checkpoint that the fine-tune started from.
        rejected: Why it was rejected, where it was and is there all the same; else empty.
    """

    folder: Path
    vector: str
    vector_revision: str | None
    fine_tune: str
    base: dict[str, Any]
    rejected: str = ""

    @classmethod
    def read(cls, name: str) -> "Release":
        """Reads the report in a folder.

        Raises:
            ConfigError: It has none, or that of a step that failed, or a damaged one.
        """
        folder = Path(name)
        file = folder / MARKER
        if not file.is_file():
            raise ConfigError(
                f"{printable(name)} is no safeguarded checkpoint, for it holds no {MARKER}: name {_meant(folder)}."
            )
        try:
            report = read_json(file.read_bytes())
            if report["status"] == "failed":
                raise ConfigError(
                    f"{printable(name)} is of a safety step that failed: name the folder of one that was accepted."
                )
            vector, base = report["vector"], report.get("base") or {}
            place, revision = vector["name"], vector.get("revision")
            fine_tune = report.get("fine_tune") or ""
            sound = isinstance(base.get("files", {}), dict) and isinstance(revision, str | None)
            sound = sound and isinstance(place, str) and isinstance(fine_tune, str)
            decision = report.get("decision") or {}
            rejected = decision["reason"] if decision.get("outcome") == "rejected" else ""
            sound = sound and isinstance(rejected, str)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ConfigError(
                f"{printable(str(file))} is damaged or of another version: run the safety step again."
            )
        return cls(folder, place, revision, fine_tune, base, rejected)

    def open_vector(self, named: str) -> SafetyVector:
        """The vector that somebody names, or else the one that the report does.

        Raises:
            ConfigError: The report's is gone.
            VectorError: It is damaged.
        """
        if named:
            return SafetyVector.from_pretrained(named)
        try:
            return SafetyVector.from_pretrained(self.vector, revision=self.vector_revision)
        except VectorError as error:
            if (Path(self.vector) / CONFIG_FILE).is_file():
                raise
            raise ConfigError(
                f"The safety vector of {printable(str(self.folder))} is not at {printable(self.vector)}, where its report says: name its "
                "folder by `--vector`."
            ) from error

    def check_fine_tune(self, named: str) -> list[str]:
        """What is to be said where nothing tells whether a model is the fine-tune that the folder was
        made from.

        Raises:
            ConfigError: It is another one, by its files' hashes.
        """
        own = self.fine_tune
        if own and Path(own).resolve() == Path(named).resolve():
            return []
        same = None
        with suppress(OSError, ValueError):  # gone, or neither a folder nor in the hub's cache
            same = same_weights(model_reference(named), model_reference(own)) if own else None
        if same is False:
            raise ConfigError(
                f"{printable(named)} is not the fine-tune that {printable(str(self.folder))} was made from: name "
                f"{printable(own)} as `model`, or leave `model` out."
            )
        if same:
            return []
        why = (
            f"its weights are not at {printable(own)} any more" if own else "its report names none"
        )
        return [
            f"Whether {printable(named)} is the fine-tune that the folder was made from cannot be told: {why}."
        ]

    def find_aligned(self, vector: SafetyVector, fine_tune: str) -> tuple[str, str | None] | None:
        """Name and revision of the aligned model, where it is on this machine: by its files' hashes
        it is the vector's, or the one that the fine-tune started from.

        Args:
            vector: The vector.
            fine_tune: The fine-tune that is shown.
        """
        own, known = vector.aligned_model, [vector.aligned_model]
        if self.base.get("other_base_allowed") and not self.base.get("carries_vector"):
            known.append(self.base)
        places = [(str(own["name"]), own.get("revision"))]
        for name in (fine_tune, self.fine_tune):
            try:
                base = adapter_base(name) if name else None
            except UnsupportedModelError:  # gone
                continue
            if base is not None:
                places.append((base, None))
        for name, revision in places:
            revision = None if Path(name).is_dir() else revision
            try:
                found = model_reference(name, revision)
            except (OSError, ValueError):  # neither a folder nor in the hub's cache
                continue
            if any(same_weights(found, each) for each in known):
                return name, revision
        return None


def _meant(folder: Path) -> str:
    """What somebody can have meant."""
    found = sorted(path.parent for path in folder.glob(f"*/{MARKER}"))
    if found:
        return printable(str(found[0]))
    return "the folder that a safety step has written, e.g. out/safeguarded"
