"""A safety vector with a component for every harm category: which prompts tell the categories, what
each module reads of them, and the split of its delta (`category_split.py`).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.validation import shown
from ..data.row_names import row_name
from ..distributed.layouts import Sharding
from ..errors import CalibrationDataError, FamilyError
from ..models.low_rank import LowRankDelta
from ..models.names import component_labels
from ..models.parameters import canonical_modules
from ..models.reasoning import PromptStyle
from ..progress import progress_bar
from .category_split import Reading, Split, split, told_apart, whole
from .prompt_passes import Places, read_prompts


logger = logging.getLogger(__name__)
LEAST = 8  # prompts of a category
MOST_BYTES = 2**30  # of inputs that are kept at a time
SHARED = "shared"
MUTE = (
    "The components of these categories act on other prompts as much as on their own, so that their coefficients say little: %s. "
    "Give more prompts of them, put categories together that are alike, or leave out `by_category`."
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

    A module that is no linear layer on all tokens, or has no more inputs than there are categories,
    stays in what is shared. The inputs of as many modules are kept at a time as `MOST_BYTES` are for,
    in float32; the prompts are read again for the next ones.

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
    modules = canonical_modules(model)
    wide = {
        name: delta.a.shape[1]
        for name, delta in deltas.items()
        if name in modules and delta.a.shape[1] > count
    }
    splits: dict[str, Split] = {}
    for group in _groups(wide, len(prompts.texts)):
        reader = _Reader({name: modules[name] for name in group}, model)
        rows = read_prompts(model, tokenizer, prompts.texts, sharding, style, reader.read)
        readings: dict[str, Reading] = {}
        with progress_bar("Splitting by category", len(group), "module") as bar:
            for name, source, states in reader.by_module(rows):
                if source not in readings:
                    readings[source] = Reading.of(states, classes, count)
                splits[name] = split(deltas[name], readings[source])
                bar.update()
    if not splits:
        raise FamilyError(
            f"No module of the vector reads every token and has inputs for {count} categories: put categories together, or leave out "
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
    for name, own in record["categories"].items():
        if component_labels([name]) == [SHARED] != [own["component"]]:
            logger.warning(
                "The category %s has the component `%s` in coefficients and reports, as `%s` is what all categories have in common.",
                shown(name),
                own["component"],
                SHARED,
            )
    mute = [name for name, own in record["categories"].items() if not acts_on_its_own(own)]
    if mute:
        logger.warning(MUTE, ", ".join(map(shown, mute)))


def acts_on_its_own(category: Mapping[str, float]) -> bool:
    """Whether a category's component reads more of its own prompts than of any others."""
    return category["reads_own"] > max(category["reads_others"], category["reads_benign"])


def _groups(widths: Mapping[str, int], prompts: int) -> list[list[str]]:
    """The modules, in order, in groups whose inputs take no more than `MOST_BYTES` together."""
    groups: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        size = 4 * width * prompts
        if size > room or not groups:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(name)
        room -= size
    return groups


class _Reader:
    """Takes the inputs of modules at the last tokens of prompts."""

    def __init__(self, modules: Mapping[str, nn.Module], model: nn.Module):
        self._modules, self._model = dict(modules), model
        self._source: dict[str, str] = {}  # the first module that is given the very same inputs
        self._widths: dict[str, int] = {}
        self._partial: set[str] = set()  # modules that a pass left out, or gave some tokens only

    def read(self, tokens: dict[str, torch.Tensor], places: Places) -> torch.Tensor:
        """Runs the model on a batch; the inputs of all sources beside each other: prompts×Σd_in."""
        found: dict[str, torch.Tensor] = {}
        given: list[tuple[str, torch.Tensor]] = []  # the last one

        def keep(name: str, inputs: torch.Tensor) -> None:
            if inputs.shape[:-1] != tokens["input_ids"].shape:
                return
            if self._source.get(name, name) == name:
                if given and given[0][1] is inputs:
                    self._source[name] = given[0][0]
                    return
                self._source[name] = name
                found[name] = inputs[places].float().cpu()
                given[:] = [(name, inputs)]

        with ExitStack() as hooks:
            for name, module in self._modules.items():
                hook = module.register_forward_pre_hook(
                    lambda _, arguments, name=name: keep(name, arguments[0])
                )
                hooks.callback(hook.remove)
            self._model(**tokens, use_cache=False)
        return self._row(found, len(places[1]))

    def _row(self, found: Mapping[str, torch.Tensor], prompts: int) -> torch.Tensor:
        if not self._widths:
            self._widths = {name: own.shape[1] for name, own in found.items()}
        self._partial |= self._widths.keys() - found.keys()
        rows = [
            found.get(name, torch.zeros(prompts, width)) for name, width in self._widths.items()
        ]
        return torch.cat([torch.zeros(prompts, 0), *rows], dim=1)

    def by_module(self, rows: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Of every module that every pass gave all tokens its name, the source of its inputs, and
        these: prompts×d_in.
        """
        parts = dict(zip(self._widths, rows.split([*self._widths.values()], dim=1), strict=True))
        for name, source in self._source.items():
            if source in parts and source not in self._partial:
                yield name, source, parts[source]


def categories_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The categories of a vector's prompts, of those that have one."""
    return {
        row["prompt"]: name for row in rows if (name := row_name(row.get("category"))) is not None
    }
