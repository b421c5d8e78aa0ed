"""The report as one HTML file that needs nothing else: no scripts, no fonts, no images from elsewhere."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from ..models.coefficients import by_component


OUTCOMES = {
    "accepted": ("Accepted", "good"),
    "accepted_best_effort": ("Accepted as best effort", "fair"),
    "rejected": ("Rejected", "bad"),
}
_MEASURES = {  # key in `measured`: what it says, whether more is better
    "refusal_rate": "Harmful prompts refused",
    "over_refusal": "Benign prompts refused",
    "incoherent": "Incoherent answers",
}
_LOSSES = {
    "safety": "Loss on refusals (nats per token)",
    "benign": "Loss on benign answers (nats per token)",
    "utility": "Divergence on the task (nats per token)",
}


def render(report: Mapping[str, Any], releases: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page. Every number of it stands in a `<data value>` with the JSON pointer of where it comes from in `data-from`.

    Args:
        report: As in `safegene_report.json`.
        releases: The model line, the oldest first, this one last.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda value: f"{value:.1%}", "decimals": lambda value: f"{value:.4g}"}
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    decision = report.get("decision") or {}
    verdict, colour = OUTCOMES.get(str(decision.get("outcome")), ("Failed", "bad"))
    if "error" in report and decision.get("outcome") != "rejected":
        verdict, colour = "Failed", "bad"
    return template.render(
        report=report,
        verdict=verdict,
        colour=colour,
        reason=report["error"]["message"] if "error" in report else decision.get("reason", ""),
        measures=_MEASURES,
        losses=_LOSSES,
        charts=_charts(report.get("coefficients", {})),
        line=_line(releases),
        releases=releases,
        outcomes={name: words for name, (words, _) in OUTCOMES.items()},
    )


def _charts(coefficients: Mapping[str, float]) -> list[dict[str, Any]]:
    """A bar chart for every component of the vector."""
    components = by_component(coefficients)
    what = "means of rank-one parts' coefficients" if any("#" in name for name in coefficients) else "coefficients"
    top = max([1.0, *(value for values in components.values() for value in values.values())])
    charts = []
    for component, values in components.items():
        largest = max(values.items(), key=lambda item: item[1])
        mean = sum(values.values()) / len(values)
        charts.append(
            {
                "title": f"Component {component}" if component else "",
                "label": f"{len(values)} {what} between 0 and {top:.2f}, mean {mean:.2f}, largest {largest[1]:.2f} at {largest[0]}",
                "top": top,
                "width": 10 * len(values),
                "bars": [
                    {"x": 10 * index, "height": 100 * value / top, "name": name, "value": value}
                    for index, (name, value) in enumerate(values.items())
                ],
            }
        )
    return charts


def _line(releases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Refusal rate of the releases that measured one, with intervals; None for fewer than two."""
    points = []
    for number, release in enumerate(releases, start=1):
        share = (release.get("after") or {}).get("refusal_rate")
        if share:
            points.append({"number": number, **share, "rejected": release["outcome"] == "rejected"})
    if len(points) < 2:
        return None
    step = 60
    for index, point in enumerate(points):
        point |= {"x": step * index + 30, "y": 100 - 100 * point["share"]}
        point |= {"top": 100 - 100 * point["high"], "bottom": 100 - 100 * point["low"]}
    words = ", ".join(
        f"release {p['number']}: {p['share']:.0%}{' (rejected)' if p['rejected'] else ''}" for p in points
    )
    return {"width": step * len(points), "points": points, "label": f"Harmful prompts refused by release. {words}"}
