"""The report, and a model line's history, each as one HTML file that needs nothing else: no scripts, no fonts, no images from
elsewhere.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from ..config.metrics import differences, shares
from ..text import isolated, printable, told_apart
from .cells import headings, measured_cells
from .headline import decisive, unknown_of_aligned, what_now
from .heat import heat_map
from .outcome import ANSWERED, OUTCOMES, minute_of, outcome_of_release, without_measurement


MOST_RELEASES = 100  # of a model line that the page shows
_MOST_NAMED = 12  # releases that a chart's label names one by one
_LOSSES = {
    "safety": "Loss on refusals (nats per token)",
    "benign": "Loss on benign answers (nats per token)",
    "utility": "Divergence on the task (nats per token)",
}
_PHASES = {
    "prepare": "settings, vector, data and places are checked",
    "keep": "the plain fine-tune is saved",
    "recalibrate": "coefficients are searched for on the shots",
    "measure": "the models answer prompts and samples that no coefficient was fitted on",
    "touch_up": "a low-rank touch-up is trained beside the vector",
    "save": "the checkpoint is written",
    "verify": "what was written is read back",
}


def render(report: Mapping[str, Any], releases: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page. Every number of it stands in a `<data value>` with the JSON pointer of where it
    comes from in `data-from`.

    Args:
        report: As in `safegene_report.json`.
        releases: The model line, the oldest first, this one last.
    """
    decision = report.get("decision") or {}
    verdict, colour = OUTCOMES.get(str(decision.get("outcome")), ("Failed", "bad"))
    if without := without_measurement(report):
        verdict, colour = verdict + without, "fair"
    if "error" in report and decision.get("outcome") != "rejected":
        verdict, colour = "Failed", "bad"
    return page_of(
        "report.html.jinja",
        report=report,
        verdict=verdict,
        colour=colour,
        decided=decisive(report),
        remedies=what_now(report),
        reason=report["error"]["message"] if "error" in report else decision.get("reason", ""),
        measures={metric.key: metric.title for metric in shares()},
        relative={metric.key: metric.title for metric in differences() if metric.relative},
        losses=_LOSSES,
        labels=defaultdict(str, {k: v[0].upper() + v[1:] for k, v in ANSWERED.items()}),
        unknown=unknown_of_aligned(report),
        phases=defaultdict(str, _PHASES),
        heat=heat_map(
            report.get("coefficients") or {}, _largest_allowed(report), report.get("vector")
        ),
        **_of_line(releases),
    )


def render_history(releases: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    """The page of a model line.

    Args:
        releases: At least one, the oldest first.
        warnings: What is to be said above them.
    """
    outcome, colour = outcome_of_release(releases[-1])
    line = _of_line(releases)
    return page_of(
        "history.html.jinja",
        verdict=f"Newest release: {outcome[0].lower()}{outcome[1:]}",
        colour=colour,
        warnings=warnings,
        count=len(releases),
        headings=headings(),
        cells=[measured_cells(release) for release in line["releases"]],
        **line,
    )


def page_of(name: str, **values: Any) -> str:
    """A page made with one of the templates here. Whatever is not markup of the template's own is
    shown character by character, after which jinja escapes it.
    """
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    environment.filters |= {
        "percent": _percent,
        "decimals": _decimals,
        "prose": _prose,
        "minute": minute_of,
    }
    return environment.get_template(name).render(**values)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _of_line(releases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the section on the model line reads."""
    first = max(0, len(releases) - MOST_RELEASES)
    return {
        "line": _line(releases, first),
        "releases": releases[first:],
        "left_out": first,
        "outcomes": [outcome_of_release(release)[0] for release in releases[first:]],
    }


def _inert(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return isolated(printable(value))


def _largest_allowed(report: Mapping[str, Any]) -> float | None:
    """`search.max_coefficient` of a report, an older one included, whose settings have no groups."""
    config = report.get("config") or {}
    bound = (config.get("search") or config).get("max_coefficient")
    return bound if _is_finite(bound) else None


def _prose(text: str) -> Markup:
    """A sentence in which what stands in backticks is code."""
    *pairs, last = str(text).split("`")
    if len(pairs) % 2:  # one without a partner
        last = f"{pairs.pop()}`{last}"
    shown = [
        Markup("<code>{}</code>" if place % 2 else "{}").format(isolated(printable(part)))
        for place, part in enumerate([*pairs, last])
    ]
    return Markup().join(shown)


def _percent(value: float | None, beside: float | None = None) -> str:
    """To a tenth, or to as many digits as it takes to tell it from the number beside it."""
    if value is None or not _is_finite(value):
        return "–"
    if beside is None or not _is_finite(beside):
        return f"{value:.1%}"
    return f"{told_apart(100 * value, 100 * beside, digits=1)[0]}%"


def _decimals(value: float | None) -> str:
    """To four digits, whole numbers and large ones to the last before the point."""
    if value is None or not _is_finite(value):
        return "–"
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(releases: Sequence[Mapping[str, Any]], first: int) -> dict[str, Any] | None:
    """Refusal rate of the releases from `first` on that measured one, with intervals; None for
    fewer than two.
    """
    points = []
    for number, release in enumerate(releases[first:], start=first + 1):
        share = (release.get("after") or {}).get("refusal_rate")
        if share and all(_is_finite(share[key]) for key in ("share", "low", "high")):
            points.append({"number": number, **share, "rejected": release["outcome"] == "rejected"})
    if len(points) < 2:
        return None
    step = min(60, 960 / len(points))
    for index, point in enumerate(points):
        point |= {"x": step * (index + 0.5), "y": 100 - 100 * point["share"]}
        point |= {"top": 100 - 100 * point["high"], "bottom": 100 - 100 * point["low"]}
    return {
        "width": step * len(points),
        "points": points,
        "label": f"Harmful prompts refused by release. {_words(points)}",
    }


def _words(points: Sequence[Mapping[str, Any]]) -> str:
    """What a line chart shows, as text."""

    def one(point: Mapping[str, Any]) -> str:
        return f"release {point['number']}: {point['share']:.0%}{' (rejected)' if point['rejected'] else ''}"

    if len(points) <= _MOST_NAMED:
        return ", ".join(map(one, points))
    least = min(points, key=lambda point: point["share"])
    return f"{len(points)} releases; first {one(points[0])}, lowest {one(least)}, last {one(points[-1])}"
