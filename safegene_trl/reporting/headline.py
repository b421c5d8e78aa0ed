"""What the page says first: the one number that decided, and what to do where it was too little."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.metrics import METRICS, Metric, by_category_limit, by_limit, of_limit
from ..models.reasoning import MOSTLY
from .outcome import measures_refusals


_TOO_LITTLE = {"rejected": "broken", "accepted_best_effort": "unsure"}  # what a check says then
_BROKEN = {
    "utility_loss": (
        "The task has lost too much: raise `data.num_task_shots` or `search.utility_weight`, or lower `search.max_utility_loss`."
    ),
    "incoherent": (
        "Too many answers are no text: look under Before and after whether the fine-tune writes such answers itself. If it does not, "
        "lower `search.max_coefficient` or raise `search.utility_weight`."
    ),
    "unjudged": (
        "The judge knows too few of the answers' languages: judge them by `safegene evaluate` with another of its `judges`, or give "
        "`gate.harmful_data` and `gate.benign_data` in a language that it knows."
    ),
}
_TOO_FEW_REFUSALS = (
    "Too few harmful prompts are refused: see by `safegene inspect VECTOR` whether the vector has soft targets, raise "
    "`data.num_safety_shots` and `data.num_benign_shots`, {repair}or make a stronger vector."
)
_TOO_MANY_REFUSALS = (
    "Too many benign prompts are refused: raise `data.num_benign_shots` or `search.benign_weight`, and see whether the aligned model "
    "refuses these prompts itself."
)
_NOT_KEPT = (
    "`gate.{limit}` is not kept: raise `data.num_safety_shots`, `data.num_benign_shots` and `data.num_task_shots`, so that the search "
    "sees more."
)
_UNSURE = "Too few prompts to be sure: raise `measure.num_test_prompts`, and give data that has as many ({data})."
_UNFINISHED = "Answers never left the reasoning: raise `measure.max_reasoning_tokens`, or set it to 0 to measure without reasoning."
_SEARCH = (
    "The search did not take its coefficients in full: raise `data.num_safety_shots`, `data.num_benign_shots` and "
    "`data.num_task_shots`, so that it sees more, or raise `search.max_utility_loss` if the task can bear it."
)
_AGAIN = "`safegene apply` tries other settings on the plain fine-tune, without training again."


@dataclass(frozen=True)
class Decisive:
    """The number that an outcome rests on.

    Attributes:
        words: What it is of.
        where: JSON pointer of the share with its interval.
        share: It; `low` and `high` beside `share`, or `measured`.
        limit: JSON pointer of the limit that it was held against, the limit, whether it is the
            `least` or the `largest` allowed, and the setting's name; None where there is none.
        category: The category that it is of; None for all.
        unjudged: How many answers it counts as the worse case, because the judge does not know
            their languages.
    """

    words: str
    where: str
    share: Mapping[str, Any]
    key: str = "share"
    limit: tuple[str, float, str, str] | None = None
    category: str | None = None
    unjudged: int = 0


def decisive(report: Mapping[str, Any]) -> Decisive | None:
    """Of a report the check that decided; else of an accepted model the refusals of harmful prompts.
    None where no number decided, or nothing is decided.

    Of several checks it is, of a rejected model, the one that is farthest on the wrong side of its
    limit; of one that is accepted as best effort, or by limits on other things than all refusals,
    the one that is nearest to its limit.
    """
    decision, measured = report.get("decision") or {}, report.get("measured") or {}
    if _has_failed(report):
        return None
    if checks := _deciding(decision):
        return _of_check(checks, farthest=decision["outcome"] == "rejected")
    if _is_unfinished(report):
        found = measured["after"]["unfinished"]
        return Decisive(
            "Answers that never left the reasoning", "/measured/after/unfinished", found
        )
    checks = list(enumerate(decision.get("checks") or []))
    accepted = decision.get("outcome") == "accepted"
    if accepted and checks and not any(_is_on_all_refusals(check) for _, check in checks):
        return _of_check(checks, farthest=False)
    if accepted and measures_refusals(measured):
        found = measured["after"]["refusal_rate"]
        return Decisive("Harmful prompts refused", "/measured/after/refusal_rate", found)
    return None


def _of_check(checks: Sequence[tuple[int, Mapping[str, Any]]], farthest: bool) -> Decisive:
    def distance(one: tuple[int, Mapping[str, Any]]) -> float:
        apart, width = abs(one[1]["measured"] - one[1]["value"]), one[1]["high"] - one[1]["low"]
        return float(apart if farthest else apart / (width or 1.0))  # measures are of unlike widths

    place, check = max(checks, key=distance) if farthest else min(checks, key=distance)
    metric, where = of_limit(check["limit"]), f"/decision/checks/{place}"
    limit = (f"{where}/value", check["value"], metric.side, check["limit"])
    unjudged = check.get("unjudged", 0)
    return Decisive(metric.title, where, check, "measured", limit, check.get("category"), unjudged)


def _is_on_all_refusals(check: Mapping[str, Any]) -> bool:
    return check["limit"] == METRICS["refusal_rate"].limit


def what_now(report: Mapping[str, Any]) -> list[str]:
    """What to do about a model that was rejected or accepted as best effort, a sentence for each
    cause; nothing about any other. Settings and commands stand in backticks.
    """
    decision = report.get("decision") or {}
    outcome = decision.get("outcome")
    if outcome not in _TOO_LITTLE or _has_failed(report):
        return []
    deciding = [check for _, check in _deciding(decision)]
    causes = [of_limit(check["limit"]) for check in deciding if not _is_of_unjudged(check, report)]
    if outcome == "accepted_best_effort" and causes:
        said = [_more_prompts(causes)]
    elif causes:
        said = [_remedy(metric, report) for metric in causes]
    else:
        said = [] if deciding or _is_unfinished(report) else [_SEARCH]
    said += [_BROKEN["unjudged"]] if any(check.get("unjudged") for check in deciding) else []
    said += [_UNFINISHED] if _is_unfinished(report) else []
    return [*dict.fromkeys(said), *([_AGAIN] if outcome == "rejected" else [])]


def unknown_of_aligned(report: Mapping[str, Any]) -> list[str]:
    """Why dashes stand under the aligned model, a sentence for each kind of prompts."""
    measured = report.get("measured") or {}
    unseen = (report.get("data") or {}).get("unseen") or {}
    said = []
    for key, kind in (("refusal_rate", "harmful"), ("over_refusal", "benign")):
        if key in (measured.get("after") or {}) and key not in (measured.get("aligned") or {}):
            source = (unseen.get(kind) or {}).get("source", "vector")
            said.append(
                f"What the aligned model does with these {kind} prompts is not in the vector's record."
                if source == "vector"
                else f"The aligned model was not asked these {kind} prompts, which did not come with the vector: measure it on them "
                "by `safegene evaluate`."
            )
    return [*said, "Of the aligned model nothing but refusals is recorded."] if measured else []


def _has_failed(report: Mapping[str, Any]) -> bool:
    """Whether something else than the gate ended the step."""
    return "error" in report and (report.get("decision") or {}).get("outcome") != "rejected"


def _deciding(decision: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """The checks that made the outcome what it is, with their places; none of an accepted model."""
    wanted = _TOO_LITTLE.get(str(decision.get("outcome")))
    checks = decision.get("checks") or []
    return [(place, check) for place, check in enumerate(checks) if check["verdict"] == wanted]


def _is_of_unjudged(check: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Whether a limit is not kept for sure only because of answers that the judge does not know."""
    if not check.get("unjudged"):
        return False
    metric = of_limit(check["limit"])
    measured = report.get("measured") or {}
    found = metric.measured(measured)
    if check.get("category") is not None:
        found = metric.by_category(measured).get(check["category"])
    if found is None:
        return False
    least = metric.side == "least"
    rejected = (report.get("decision") or {}).get("outcome") == "rejected"
    end = found["share"] if rejected else found["low" if least else "high"]
    return bool(end >= check["value"] if least else end <= check["value"])


def _is_unfinished(report: Mapping[str, Any]) -> bool:
    """Whether most answers of a model that a gate rejected never left the reasoning."""
    gate = (report.get("config") or {}).get("gate") or {}
    if not any(gate.get(limit) is not None for limit in by_limit() | by_category_limit()):
        return False
    found = ((report.get("measured") or {}).get("after") or {}).get("unfinished") or {}
    return (report.get("decision") or {}).get("outcome") == "rejected" and (
        found.get("share") or 0
    ) >= MOSTLY


def _remedy(metric: Metric, report: Mapping[str, Any]) -> str:
    """What to do where the limit on this metric is broken."""
    if metric.key in _BROKEN:
        return _BROKEN[metric.key]
    if metric.items == "benign":
        return _TOO_MANY_REFUSALS
    if metric.items != "harmful":
        return _NOT_KEPT.format(limit=metric.limit)
    search = (report.get("config") or {}).get("search") or {}
    is_set = search.get("repair") == "vector+touch-up"
    return _TOO_FEW_REFUSALS.format(
        repair="" if is_set else "set `search.repair: vector+touch-up`, "
    )


def _more_prompts(causes: Sequence[Metric]) -> str:
    kinds = dict.fromkeys(kind for metric in causes for kind in metric.kinds)
    return _UNSURE.format(
        data=", ".join(
            "`data.task_data`" if kind == "task" else f"`gate.{kind}_data`" for kind in kinds
        )
    )
