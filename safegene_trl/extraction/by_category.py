"""A safety vector with a component for every harm category: which prompts tell the categories, what
each module reads of them, and the split of its delta (`category_split.py`).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.validation import shown
from ..distributed.layouts import Sharding
from ..errors import CalibrationDataError, FamilyError
from ..models.low_rank import LowRankDelta
from ..models.names import component_labels
from ..models.parameters import canonical_modules
from ..models.reasoning import PromptStyle
from .category_split import Basis, Split, split, told_apart, whole
from .prompt_passes import Places, read_prompts


logger = logging.getLogger(__name__)
LEAST = 8  # prompts of a category
SHARED = "shared"
MUTE = (
    "The components of these categories act on other prompts as much as on their own, so that their coefficients say little: %s. "
    "Give more prompts of them, put categories together that are alike, or make the vector with a larger `rank`."
)


@dataclass(frozen=True)
class CategoryPrompts:
    """The prompts by which a vector is split.

    Attributes:
        harmful: Those with a category, by it; the categories in alphabetical order.
        benign: What the categories are told from beside each other.
        without: How many harmful prompts have no category.
    """

    harmful: dict[str, list[str]]
    benign: list[str]
    without: int

    @classmethod
    def of(
        cls, harmful: Sequence[str], benign: Sequence[str], categories: Mapping[str, str]
    ) -> "CategoryPrompts":
        """Of prompts and their categories.

        Raises:
            CalibrationDataError: There are fewer than two categories, or fewer than eight prompts of
                one of them or of the benign ones.
        """
        named: dict[str, list[str]] = {}
        for text in harmful:
            if (category := categories.get(text, "")).strip():
                named.setdefault(category, []).append(text)
        if len(named) < 2:
            held = (
                "no category" if not named else f"one category alone ({shown(next(iter(named)))})"
            )
            raise CalibrationDataError(
                f"`by_category` is set, and the harmful prompts that are asked have {held}: give a data set with a column `category` of "
                "two or more, or leave out `by_category`."
            )
        few = {name: len(own) for name, own in sorted(named.items()) if len(own) < LEAST}
        if few:
            listed = ", ".join(f"{shown(name)} ({count})" for name, count in few.items())
            raise CalibrationDataError(
                f"`by_category` needs {LEAST} prompts of every category among the harmful ones that are asked, and there are fewer of "
                f"{listed}: give more of them, raise `num_safety_prompts`, or leave their rows' `category` empty."
            )
        if len(benign) < LEAST:
            raise CalibrationDataError(
                f"`by_category` tells categories from benign prompts too and needs {LEAST} of these, and there are {len(benign)}: give "
                "more `benign_data`, or raise `num_benign_prompts`."
            )
        without = len(harmful) - sum(map(len, named.values()))
        return cls(dict(sorted(named.items())), list(benign), without)

    def check_rank(self, rank: int) -> None:
        """Raises `FamilyError` unless deltas of this rank have room for every category."""
        needed = len(self.harmful) + 1
        if rank < needed:
            raise FamilyError(
                f"There are {len(self.harmful)} categories and the deltas are of rank {rank}, of which they need {needed}: set `rank: "
                f"{needed}` or more (the difference of two LoRAs has no more than theirs), or put categories together."
            )

    @property
    def texts(self) -> list[str]:
        """All of them, category after category, benign ones last."""
        return [text for own in (*self.harmful.values(), self.benign) for text in own]

    @property
    def classes(self) -> torch.Tensor:
        """Of each the number of its category, of a benign one the number of categories: int64."""
        counts = [*map(len, self.harmful.values()), len(self.benign)]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


@dataclass(frozen=True)
class ByCategory:
    """A vector's deltas by category.

    Attributes:
        deltas: Stacked factors by module, float32.
        record: What the vector says of its components.
    """

    deltas: dict[str, LowRankDelta]
    record: dict[str, Any]


def split_by_category(
    deltas: Mapping[str, LowRankDelta],
    prompts: CategoryPrompts,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    sharding: Sharding,
) -> ByCategory:
    """Deltas of one rank as the components `shared`, of that rank, and one of rank one for every
    category. Collective.

    Of a prompt and module the at most r numbers are kept that the delta reads of it, so that memory
    does not grow with the model's width. A module that is no linear layer on all tokens (an expert),
    or whose delta has no rank for all categories, stays in what is shared.

    Args:
        deltas: By module, float32; the same in all processes.
        prompts: They tell the categories.
        model: The aligned model.
        tokenizer: Its tokenizer.
        style: How prompts are written.
        sharding: How the model is spread over ranks.

    Raises:
        FamilyError: No module can be split.
    """
    count, classes = len(prompts.harmful), prompts.classes
    bases = {name: Basis.of(delta) for name, delta in deltas.items()}
    wide = {name: basis for name, basis in bases.items() if basis.rank > count}
    if not wide:
        prompts.check_rank(max(basis.rank for basis in bases.values()))
    states = _states(wide, prompts.texts, model, tokenizer, style, sharding)
    splits = {
        name: split(deltas[name], bases[name], own, classes, count) for name, own in states.items()
    }
    if not splits:
        raise FamilyError(
            "None of the vector's modules reads every token of a prompt, so that it cannot be made by category: leave out "
            "`by_category`."
        )
    found = {
        name: splits[name].delta if name in splits else whole(delta, count)
        for name, delta in deltas.items()
    }
    return ByCategory(found, _record(prompts, splits, deltas))


def _record(
    prompts: CategoryPrompts, splits: Mapping[str, Split], deltas: Mapping[str, LowRankDelta]
) -> dict[str, Any]:
    rank, count = next(iter(deltas.values())).a.shape[0], len(prompts.harmful)
    labels = component_labels([SHARED, *prompts.harmful])
    reads = told_apart(splits, prompts.classes, count)
    return {
        "rank": rank + count,
        "components": [rank, *[1] * count],
        "component_names": labels,
        "by_category": {
            "categories": {
                name: {"component": label, "prompts": len(own), **read}
                for (name, own), label, read in zip(
                    prompts.harmful.items(), labels[1:], reads, strict=True
                )
            },
            "benign_prompts": len(prompts.benign),
            "without_category": prompts.without,
            "modules": {"split": len(splits), "whole": len(deltas) - len(splits)},
        },
    }


def tell(record: Mapping[str, Any]) -> None:
    """Says what somebody may not expect of the components: prompts that have no category, categories
    that are not told apart.
    """
    if record["without_category"]:
        logger.warning(
            "%s harmful prompts have no category: what they need is in the shared component alone.",
            record["without_category"],
        )
    mute = [name for name, own in record["categories"].items() if not acts_on_its_own(own)]
    if mute:
        logger.warning(MUTE, ", ".join(map(shown, mute)))


def acts_on_its_own(category: Mapping[str, float]) -> bool:
    """Whether a category's component reads more of its own prompts than of any others."""
    return category["reads_own"] > max(category["reads_others"], category["reads_benign"])


def _states(
    bases: Mapping[str, Basis],
    texts: Sequence[str],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    sharding: Sharding,
) -> dict[str, torch.Tensor]:
    """What every module's delta reads of each prompt's last token: by module, prompts×ρ, float64."""
    modules = canonical_modules(model)
    reader = _Reader({name: basis for name, basis in bases.items() if name in modules})

    def read(tokens: dict[str, torch.Tensor], places: Places) -> torch.Tensor:
        found: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:
            for name in reader.bases:
                keep = reader.hook(name, tokens["input_ids"].shape, places, found)
                hooks.callback(modules[name].register_forward_pre_hook(keep).remove)
            model(**tokens, use_cache=False)
        return reader.row_of(found, len(places[1]))

    read_all = read_prompts(model, tokenizer, texts, sharding, style, read)
    return reader.by_module(read_all)


class _Reader:
    """Takes what deltas read from the inputs of their modules in forward passes."""

    def __init__(self, bases: Mapping[str, Basis]):
        self.bases = dict(bases)
        self._unread: set[str] = set()  # those that some pass left out, or gave some tokens only

    def hook(
        self, name: str, shape: torch.Size, places: Places, found: dict[str, torch.Tensor]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """For a module in a pass over tokens of this shape: puts into `found` what its delta reads of
        the last ones.
        """

        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments[0].shape[:-1] == shape:
                found[name] = arguments[0][places].double().cpu() @ self.bases[name].inputs

        return keep

    def row_of(self, found: Mapping[str, torch.Tensor], prompts: int) -> torch.Tensor:
        """What a pass has given, module after module: prompts×Σρ; zeros for those that it left out."""
        self._unread |= self.bases.keys() - found.keys()
        rows = [
            found.get(name, torch.zeros(prompts, basis.rank, dtype=torch.float64))
            for name, basis in self.bases.items()
        ]
        return torch.cat(rows, dim=1)

    def by_module(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same by module, without those that were left out."""
        parts = rows.split([basis.rank for basis in self.bases.values()], dim=1)
        return {
            name: part
            for name, part in zip(self.bases, parts, strict=True)
            if name not in self._unread
        }


def categories_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The categories of a vector's prompts, of those that have one."""
    return {row["prompt"]: row["category"] for row in rows if "category" in row}
