"""A model line's numbers in Prometheus' text format, as the node exporter's textfile collector reads
it (https://prometheus.io/docs/instrumenting/exposition_formats).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config.metrics import METRICS
from .outcome import OUTCOMES, time_of


_BOUNDS = {"": "share", "_low": "low", "_high": "high", "_count": "count"}


def exposition(releases: Sequence[Mapping[str, Any]], drifts: int) -> str:
    """The text: how many releases there are, when the newest was made and what came of it, and of
    each metric its share (0–1) with the ends of its 95 % interval and the number of items. A metric
    that was not measured is left out.

    Args:
        releases: At least one, the oldest first.
        drifts: How many warnings of drift there are.
    """
    newest = releases[-1]
    counts = Counter(release["outcome"] for release in releases)
    lines = [
        *_family("safegene_releases", "Releases of the model line, by outcome."),
        *(_sample("safegene_releases", counts[own], outcome=own) for own in OUTCOMES),
        *_family("safegene_release_outcome", "1 for what came of the newest release."),
        *(
            _sample("safegene_release_outcome", int(newest["outcome"] == own), outcome=own)
            for own in OUTCOMES
        ),
        *_family("safegene_release_time_seconds", "When the newest release was made, Unix time."),
        _sample("safegene_release_time_seconds", time_of(newest).timestamp()),
        *_family("safegene_drift_warnings", "Warnings that refusals drift over the releases."),
        _sample("safegene_drift_warnings", drifts),
    ]
    for metric in METRICS.values():
        sides = {side: metric.measured(newest, side) for side in ("before", "after")}
        for ending, key in _BOUNDS.items():
            name = f"safegene_{metric.key}{ending}"
            samples = [
                _sample(name, found[key], **({} if metric.difference else {"side": side}))
                for side, found in sides.items()
                if found and math.isfinite(found[key])
            ]
            what = {"": "share", "_count": "number of items"}.get(
                ending, "end of its 95 % interval"
            )
            lines += [*_family(name, f"{metric.title}: {what}."), *samples] if samples else []
    return "\n".join(lines) + "\n"


def _family(name: str, words: str) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} gauge"


def _sample(name: str, value: float, **labels: str) -> str:
    said = ",".join(f'{key}="{own}"' for key, own in labels.items())
    return f"{name}{{{said}}} {value}" if said else f"{name} {value}"
