"""What became of a fine-tune, in words: the same on the page, on the card and in a terminal."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ..config.metrics import METRICS
from ..models.reasoning import MOSTLY


OUTCOMES = {
    "accepted": ("Accepted", "good"),
    "accepted_best_effort": ("Accepted as best effort", "fair"),
    "rejected": ("Rejected", "bad"),
}
UNMEASURED = " without a measurement of refusals"


def measures_refusals(measured: Mapping[str, Any] | None) -> bool:
    """Whether a report's `measured` says how many harmful prompts the safeguarded model refuses;
    it does not where most of the answers are in languages that the judge does not know.
    """
    found = METRICS["refusal_rate"].measured(measured or {})
    return found is not None and not mostly_unjudged(found)


def mostly_unjudged(share: Mapping[str, float]) -> bool:
    """Whether half or more of the answers that a share is of are `unjudged`."""
    return share.get("unjudged", 0) >= MOSTLY * share["count"]


def without_measurement(report: Mapping[str, Any]) -> str:
    """What goes after the outcome of a report in which nothing says that refusals came back; empty
    for every other.
    """
    accepted = str((report.get("decision") or {}).get("outcome", "")).startswith("accepted")
    return UNMEASURED if accepted and not measures_refusals(report.get("measured")) else ""


def outcome_of_release(release: Mapping[str, Any]) -> tuple[str, str]:
    """Words and colour of what became of a release in a model line."""
    words, colour = OUTCOMES[release["outcome"]]
    if release["outcome"] == "rejected" or measures_refusals(release):
        return words, colour
    return words + UNMEASURED, "fair"


def time_of(release: Mapping[str, Any]) -> datetime:
    """When a release was made, in UTC, which a time without a zone is taken to be in."""
    found = datetime.fromisoformat(release["time"])
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def minute_of(release: Mapping[str, Any]) -> str:
    """The same as text, to the minute."""
    return f"{time_of(release):%Y-%m-%d %H:%M}"


def verdict(report: Mapping[str, Any]) -> str:
    """A decided report's outcome in lower case, like `accepted best effort`."""
    return report["decision"]["outcome"].replace("_", " ") + without_measurement(report)
