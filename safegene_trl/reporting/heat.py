"""A vector's coefficients as tables of coloured cells, layers by kinds of modules, a table for each
component: what the template draws.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..models.names import are_of_parts, by_component, layer_index, module_kind


_CELL = 18  # pixels from one cell to the next
_TOP = 16  # of the first row
_LETTER = 6.2  # pixels of a letter of a row's name, on average
_Place = tuple[str, int | None]  # kind of module, layer


def heat_map(
    coefficients: Mapping[str, float],
    bound: float | None,
    vector: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The panels of a page, all with the same rows, columns and colours.

    Args:
        coefficients: λ by name, as in a report; those that are no finite number are left out. Where
            several belong to one cell (rank-one parts, experts of a layer) it has their mean.
        bound: The largest λ that the search may give, None where that is not known.
        vector: Its record in the report, which may tell what a component with a number is.

    Returns:
        None for no coefficients. Else `top`, which the deepest colour stands for: the bound, or the
        largest coefficient where that is larger (an earlier release may have added to it) or there
        is no bound; whether it `is_bound`; `what` a cell is of; places in pixels.
    """
    finite = {
        name: value
        for name, value in coefficients.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    if not finite:
        return None
    components = {label: _cells(values) for label, values in by_component(finite).items()}
    places = dict.fromkeys(place for cells in components.values() for place in cells)
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    layers = sorted({layer for _, layer in places if layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(p[1] is None for p in places) else [])]
    largest = max(value for cells in components.values() for value, _ in cells.values())
    top = max(bound or 0.0, largest) or 1.0
    models = _degraded_models(vector or {}, len(components))
    left = round(12 + _LETTER * max(len(_row_name(kind)) for kind in kinds))
    x = {layer: left + _CELL * place for place, layer in enumerate(columns)}
    y = {kind: _TOP + _CELL * place for place, kind in enumerate(kinds)}
    return {
        "top": top,
        "is_bound": bound is not None and top == bound,
        "what": _what(finite, kinds),
        "left": left,
        "width": left + _CELL * len(columns) + 8,
        "height": _TOP + _CELL * len(kinds) + 4,
        "columns": [{"x": x[layer], "name": "–" if layer is None else layer} for layer in columns],
        "rows": [{"y": y[kind], "name": _row_name(kind)} for kind in kinds],
        "panels": [
            {
                "title": _title(label, models),
                "label": _label(cells),
                "cells": [
                    {
                        "x": x[layer],
                        "y": y[kind],
                        "value": value,
                        "share": value / top,
                        "name": name,
                    }
                    for (kind, layer), (value, name) in cells.items()
                ],
            }
            for label, cells in components.items()
        ],
    }


def _degraded_models(vector: Mapping[str, Any], components: int) -> list[str]:
    """What the degraded model of each component was called, "" for one that was made without, where
    each is a vector of its own; else nothing.
    """
    made = vector.get("extraction")
    parts = made.get("vectors") if isinstance(made, Mapping) else None
    try:
        models = [part["degraded_model"] for part in parts or ()]
        names = [str(model["name"]) if model["files"] else "" for model in models]
    except (KeyError, TypeError):
        return []
    return [Path(name).name for name in names] if len(names) == components else []


def _title(label: str, models: list[str]) -> str:
    if label.isdecimal() and int(label) < len(models) and (model := models[int(label)]):
        return f"Component {label}: what {model} had lost"
    return f"Component {label}" if label else ""


def _cells(values: Mapping[str, float]) -> dict[_Place, tuple[float, str]]:
    """By cell its value and what it is called, of one component's coefficients by name."""
    found: dict[_Place, list[float]] = defaultdict(list)
    names: dict[_Place, str] = {}
    for name, value in values.items():
        place = (module_kind(name), layer_index(name))
        found[place].append(value)
        names.setdefault(place, name)
    return {
        place: (
            fmean(own),
            names[place]
            if len(own) == 1
            else f"{place[0]} of layer {place[1]}, mean of {len(own)}",
        )
        for place, own in found.items()
    }


def _label(cells: Mapping[_Place, tuple[float, str]]) -> str:
    """A panel in words."""
    value, name = max(cells.values(), key=lambda cell: cell[0])
    mean, none = fmean(value for value, _ in cells.values()), sum(not v for v, _ in cells.values())
    return f"{len(cells)} cells: mean {mean:.2f}, largest {value:.2f} at {name}, {none} at 0"


def _what(coefficients: Mapping[str, float], kinds: list[str]) -> str:
    if are_of_parts(coefficients):
        return "rank-one part (cells show means)"
    return "layer" if kinds == [""] else "module"


def _row_name(kind: str) -> str:
    return kind or "whole layer"
