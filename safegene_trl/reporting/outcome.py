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
ANSWERED = {  # by the judge's label
    "refused": "refuses",
    "answered": "answers",
    "incoherent": "is incoherent",
    "unfinished": "comes to no answer",
    "unjudged": "in a language that the judge does not know",
}


def measures_refusals(measured: Mapping[str, Any] | None) -> bool:
    """Whether a report's `measured` says how many harmful prompts the safeguarded model refuses;
    it does not where most of the answers are in languages that the judge does not know.
    """
    found = METRICS["refusal_rate"].measured(measured or {})
    return found is not None and not mostly_unjudged(found)


def mostly_unjudged(share: Mapping[str, float]) -> bool:
    """Whether half or more of the answers that a share is of are `unjudged`."""
    return share.get("unjudged", 0) >= MOSTLY * share["count"]


def unmeasured(outcome: str, measured: Mapping[str, Any] | None) -> str:
    """What goes after the outcome where nothing says that refusals came back; empty everywhere else.

    Args:
        outcome: Of a report or a release.
        measured: A report's `measured`, or the release, which has the same keys.
    """
    return UNMEASURED if outcome.startswith("accepted") and not measures_refusals(measured) else ""


def without_measurement(report: Mapping[str, Any]) -> str:
    """The same of a report, which may be without a decision."""
    outcome = str((report.get("decision") or {}).get("outcome", ""))
    return unmeasured(outcome, report.get("measured"))


def outcome_of_release(release: Mapping[str, Any]) -> tuple[str, str]:
    """Words and colour of what became of a release in a model line."""
    words, colour = OUTCOMES[release["outcome"]]
    without = unmeasured(release["outcome"], release)
    return words + without, "fair" if without else colour


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
