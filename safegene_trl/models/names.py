"""What the names of modules and coefficients say: layers, components, rank-one parts."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import groupby
from statistics import fmean


_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_index(module_name: str) -> int | None:
    """Index of the transformer layer a module belongs to: the first number in its dotted name."""
    match = _LAYER_INDEX.search(module_name)
    return int(match.group(1)) if match else None


def layers_of(module_names: Iterable[str]) -> list[int]:
    """Indices of the layers that modules belong to, in order."""
    return sorted({index for name in module_names if (index := layer_index(name)) is not None})


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers in order, for people: `0–3, 7`."""
    # neighbours have the same difference between layer and place
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def by_component(coefficients: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """As people look at coefficients: by component ("" where there is one) and layer or module, of
    rank-one parts the mean.
    """
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in coefficients.items():
        place, _, component = name.partition("#")[0].partition("/")
        parts[component][place].append(value)
    return {
        component: {place: fmean(own) for place, own in places.items()}
        for component, places in parts.items()
    }


def are_of_parts(coefficients: Iterable[str]) -> bool:
    """Whether these are names of rank-one parts' coefficients."""
    return any("#" in name for name in coefficients)
