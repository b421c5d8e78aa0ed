"""The prompts that an extraction is given, read from its data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.rows import conversation
from ..data.sources import draw, load_rows
from ..errors import CalibrationDataError
from ..provenance import sha256_of_json
from .config import ExtractionConfig


@dataclass(frozen=True)
class ExtractionPrompts:
    """All prompts that an extraction is given.

    Attributes:
        config: How many of them are drawn for what, and by which seed.
        harmful: Each one user turn.
        benign: Each one user turn.
        categories: Of the harmful ones that have one.
    """

    config: ExtractionConfig
    harmful: list[str]
    benign: list[str]
    categories: dict[str, str]

    @classmethod
    def read(cls, config: ExtractionConfig) -> "ExtractionPrompts":
        """Those of a config's data sets.

        Raises:
            CalibrationDataError: They cannot be read, or one is more than a user turn.
        """
        harmful, benign = (
            _read_prompts(source, config.data_split)
            for source in (config.harmful_data, config.benign_data)
        )
        return cls(
            config, harmful, benign, _read_categories(config.harmful_data, config.data_split)
        )

    def to_answer(self) -> tuple[list[str], list[str]]:
        """The harmful and benign prompts that the aligned model is asked."""
        counts = self.config.num_safety_prompts, self.config.num_benign_prompts
        return self._drawn(*counts)

    def to_select_by(self) -> tuple[list[str], list[str]]:
        """The harmful and benign prompts that layers are selected by."""
        count = self.config.num_selection_prompts
        return self._drawn(count, count)

    def _drawn(self, harmful: int, benign: int) -> tuple[list[str], list[str]]:
        seed = self.config.seed
        return draw(self.harmful, harmful, seed), draw(self.benign, benign, seed)

    def record(self, answers: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """What a vector says of the prompts that it was selected by, `answers` being stored with
        it.
        """
        config = self.config
        return {
            "prompts": min(config.num_selection_prompts, len(self.harmful), len(self.benign)),
            "seed": config.seed,
            "harmful_data": sha256_of_json(self.harmful),
            "benign_data": sha256_of_json(self.benign),
            "categories": self._refused_by_category(answers),
        }

    def with_categories(self, answers: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Rows of prompts and answers, each with its prompt's category where it has one."""
        return [
            row | {"category": self.categories[row["prompt"]]}
            if row["prompt"] in self.categories
            else row
            for row in answers
        ]

    def _refused_by_category(
        self, answers: Sequence[Mapping[str, str]]
    ) -> dict[str, dict[str, int]]:
        """How many prompts of each category the aligned model was asked, and how many it refused:
        where few, the vector is weak.
        """
        refused = {row["prompt"] for row in answers}
        found: dict[str, dict[str, int]] = {}
        for prompt in self.to_answer()[0]:
            if prompt in self.categories:
                count = found.setdefault(self.categories[prompt], {"asked": 0, "refused": 0})
                count["asked"] += 1
                count["refused"] += prompt in refused
        return dict(sorted(found.items()))


def _read_prompts(source: str, split: str) -> list[str]:
    """The prompts of a data set, each one user turn."""
    prompts = []
    for row in load_rows(source, split):
        messages, _ = conversation(row)
        if [message["role"] for message in messages] != ["user"]:
            raise CalibrationDataError(
                f"A prompt of {source} is not a single user turn: give single-turn prompts."
            )
        prompts.append(messages[0]["content"])
    return prompts


def _read_categories(source: str, split: str) -> dict[str, str]:
    """The category of every prompt of a data set that has a column `category`."""
    rows = load_rows(source, split)
    if "category" not in rows.column_names:
        return {}
    return {
        conversation(row)[0][0]["content"]: str(row["category"])
        for row in rows
        if row["category"] is not None
    }
