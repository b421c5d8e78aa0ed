"""The prompts that an extraction is given, read from its data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.measure import MeasureConfig
from ..data.forms import plain
from ..data.prompts import Kind, Prompt, in_turn, kept_apart, near_duplicates
from ..data.row_names import RowNames
from ..data.rows import conversation
from ..data.sources import draw, load_rows
from ..errors import CalibrationDataError
from ..models.reasoning import Answering
from ..provenance import sha256_of_json
from ..vectors.prompt_rows import rows_of
from .by_category import CategoryPrompts, categories_of
from .config import ExtractionConfig
from .covering import Cover, read_cover


@dataclass(frozen=True)
class ExtractionPrompts:
    """All prompts that an extraction is given.

    Attributes:
        config: How many of them are drawn for what, and by which seed.
        harmful: Each one user turn.
        benign: Each one user turn.
        categories: Of those that have one, and are harmful or to measure on.
        tests: By kind those to measure on, each one user turn and none of them near one that is
            answered or selected by; empty without such data.
        repeated: By kind how many were left out because they are.
        stored: Those of a vector whose prompts these are added to.
        cover: Those for the blind spots of an audit.
    """

    config: ExtractionConfig
    harmful: list[str]
    benign: list[str]
    categories: dict[str, str]
    tests: dict[str, list[str]] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    stored: Sequence[str] = ()
    cover: Cover = field(default_factory=Cover)

    @classmethod
    def read(
        cls, config: ExtractionConfig, stored: Sequence[str] = (), measured: Sequence[str] = ()
    ) -> "ExtractionPrompts":
        """Those of a config's data sets.

        Args:
            config: It names them; none of a kind where it names no data set.
            stored: Prompts of a vector, which are not asked again.
            measured: Others of it, which it measures on: none that nearly repeats one is asked.

        Raises:
            CalibrationDataError: They cannot be read, one is more than a user turn, or all of those
                to measure on repeat others.
        """
        harmful, benign = (
            _unlike(_read_prompts(source, config.data_split), stored, measured) if source else []
            for source in (config.harmful_data, config.benign_data)
        )
        sources: dict[Kind, str | None] = {
            "harmful": config.test_harmful_data,
            "benign": config.test_benign_data,
        }
        tests = {kind: source for kind, source in sources.items() if source is not None}
        categories = {
            prompt: category
            for source in (config.harmful_data, *tests.values())
            if source
            for prompt, category in _read_categories(source, config.data_split).items()
        }
        cover = Cover()
        if config.cover:  # in a form of its own a prompt that the vector has is another one
            texts = _read_prompts(config.harmful_data, config.data_split)
            cover = read_cover(config, texts, categories, stored, measured)
        if config.cover and config.vector:
            harmful = []  # but for those of the blind spots
        categories |= cover.categories
        found = cls(config, harmful, benign, categories, stored=stored, cover=cover)
        for kind, source in tests.items():
            found._add_tests(kind, source)
        return found

    def _add_tests(self, kind: Kind, source: str) -> None:
        """Prompts to measure on: drawn from those that are not near one that is used otherwise."""
        asked = [text for own in (*self.to_answer(), *self.to_select_by()) for text in own]
        used = [plain(text) for text in (*self.stored, *asked)]  # a frame hides what is in it
        texts = _read_prompts(source, self.config.data_split)
        prompts = [
            Prompt(Path(source).stem, kind, None, ({"role": "user", "content": text},))
            for text in texts
        ]
        left, repeated = kept_apart(prompts, used)
        self.tests[kind] = self._covering(
            [prompt.text for prompt in left], self.config.num_test_prompts
        )
        self.repeated[kind] = len(repeated)

    def to_answer(self) -> tuple[list[str], list[str]]:
        """The harmful and benign prompts that the aligned model is asked."""
        return (
            list(
                dict.fromkeys(
                    [
                        *self._covering(self.harmful, self.config.num_safety_prompts),
                        *self.cover.prompts,
                    ]
                )
            ),
            self._covering(self.benign, self.config.num_benign_prompts),
        )

    def to_select_by(self) -> tuple[list[str], list[str]]:
        """The harmful and benign prompts that layers are selected by."""
        count, seed = self.config.num_selection_prompts, self.config.seed
        return draw(self.harmful, count, seed), draw(self.benign, count, seed)

    def _covering(self, texts: Sequence[str], count: int) -> list[str]:
        """Up to `count` of them in seeded order, in turn of the categories where they have any."""
        if self.categories.keys().isdisjoint(texts):
            return draw(texts, count, self.config.seed)
        return in_turn(texts, count, self.config.seed, self.categories.get)

    def by_category(self, stored: Sequence[Mapping[str, Any]] = ()) -> CategoryPrompts | None:
        """Those that tell the categories of a vector that is made by category, None for any other.

        Args:
            stored: A vector's rows with answers, to which these are added.

        Raises:
            CalibrationDataError: They do not tell them.
        """
        if not self.config.by_category:
            return None
        harmful, benign = self.to_answer()
        return CategoryPrompts.of(
            [*(row["prompt"] for row in rows_of(stored, "harmful")), *harmful],
            [*(row["prompt"] for row in rows_of(stored, "benign", "border")), *benign],
            categories_of(stored) | self.categories,
        )

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
            "categories": self.refused_by_category(answers),
            **self.cover_record(answers),
        }

    def test_record(
        self, answering: Answering, counts: Mapping[str, Mapping[str, int]]
    ) -> dict[str, Any]:
        """What a vector says of the prompts to measure on that come with it; `counts`: the aligned
        model's answers by kind and label.
        """
        found: dict[str, Any] = {
            "max_new_tokens": MeasureConfig.max_new_tokens,
            "max_reasoning_tokens": answering.max_reasoning_tokens,
        }
        for kind, texts in self.tests.items():
            repeated = self.repeated[kind]
            found[kind] = {
                "sha256": sha256_of_json(texts),
                "asked": len(texts),
                **counts[kind],
                **({"repeated": repeated} if repeated else {}),
            }
        return found

    def with_categories(self, answers: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Rows of prompts and answers, each with its prompt's category where it has one."""
        return [
            row | {"category": self.categories[row["prompt"]]}
            if row["prompt"] in self.categories
            else row
            for row in answers
        ]

    def further_record(self) -> dict[str, Any]:
        """What a vector says of the prompts that were added to its own."""
        harmful, benign = self.to_answer()
        return {
            "seed": self.config.seed,
            "harmful_data": sha256_of_json(self.harmful),
            "benign_data": sha256_of_json(self.benign),
            "asked": {"harmful": len(harmful), "benign": len(benign)},
        }

    def cover_record(self, answers: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """What a vector says of prompts for blind spots, and how many of them the aligned model
        refused; nothing where there are none.
        """
        if not self.cover.prompts:
            return {}
        refused = {row["prompt"] for row in rows_of(answers, "harmful")}
        return {
            "cover": self.cover.record
            | {"refused": sum(prompt in refused for prompt in self.cover.prompts)}
        }

    def refused_by_category(
        self, answers: Sequence[Mapping[str, str]]
    ) -> dict[str, dict[str, int]]:
        """How many prompts of each category the aligned model was asked, and how many it refused:
        where few, the vector is weak.
        """
        refused = {row["prompt"] for row in rows_of(answers, "harmful")}
        found: dict[str, dict[str, int]] = {}
        for prompt in self.to_answer()[0]:
            if prompt in self.categories:
                count = found.setdefault(self.categories[prompt], {"asked": 0, "refused": 0})
                count["asked"] += 1
                count["refused"] += prompt in refused
        return dict(sorted(found.items()))


def _unlike(texts: Sequence[str], stored: Sequence[str], measured: Sequence[str]) -> list[str]:
    """The texts that are none of the stored ones and not near one that is measured on."""
    known = set(stored)
    left = [text for text in texts if text not in known]
    near = near_duplicates(left, measured)
    return [text for index, text in enumerate(left) if index not in near]


def _read_prompts(source: str, split: str) -> list[str]:
    """The prompts of a data set, each one user turn, and each once."""
    prompts = []
    for row in load_rows(source, split):
        if isinstance(row.get("prompt"), str) and not row["prompt"].strip():
            raise CalibrationDataError(f"A prompt of {source} is empty: remove its row.")
        messages, _ = conversation(row)
        if [message["role"] for message in messages] != ["user"]:
            raise CalibrationDataError(
                f"A prompt of {source} is not a single user turn: give single-turn prompts."
            )
        prompts.append(messages[0]["content"])
    return list(dict.fromkeys(prompts))


def _read_categories(source: str, split: str) -> dict[str, str]:
    """The category of every prompt of a data set that has a column `category`."""
    rows = load_rows(source, split)
    if "category" not in rows.column_names:
        return {}
    found = RowNames("category")
    for row in rows:
        if row["category"] is not None:
            found.add(conversation(row)[0][0]["content"], row["category"])
    found.tell(source)
    return {str(prompt): name for prompt, name in found.of.items()}
