"""Coefficients as people look at them: by component, and of a module's rank-one parts the mean."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean


def by_component(coefficients: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By component ("" where there is one) and layer or module: its coefficient, or the mean of its rank-one parts'."""
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in coefficients.items():
        place, _, component = name.partition("#")[0].partition("/")
        parts[component][place].append(value)
    return {component: {place: fmean(own) for place, own in places.items()} for component, places in parts.items()}
