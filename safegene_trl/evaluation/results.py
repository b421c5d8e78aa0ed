"""From verdicts to numbers: shares with intervals, per set and per category."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.prompts import Prompt
from ..judges import ATTACK_SUCCEEDED, Verdict
from ..judges.intervals import Rate, mean_of_sets_interval, rate
from .agreement import WITHOUT_ANSWER, Comparison, disagreement


class _Judged(NamedTuple):
    prompt: Prompt
    label: str
    comparison: Comparison | None  # None where there is one judge alone


def summary(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    seed: int = 0,
    comparisons: Sequence[Comparison] | None = None,
) -> dict[str, Any]:
    """What one judge's verdicts on a model's answers come to.

    Args:
        prompts: What was answered.
        verdicts: The judge's, in the same order.
        seed: Of the bootstrap.
        comparisons: In the same order, how it and the other judges decide; None where there are no
            others.

    Returns:
        `sets`: for every prompt set its `kind`, the share of each label and `attack_success`
            (harmful) or `answered` and
        `over_refusal` (benign) with Wilson's 95 % interval, and the same per category;
            `attack_success`: the mean over the
        harmful sets (their ASR) with a bootstrap interval, of one set Wilson's, and null where
            several sets are each all alike:
        drawn again they would come out the same, which says nothing; `over_refusal`: the same over
            benign ones.
        Unjudged and unfinished answers are counted, and left out of these shares. Where some are
            unfinished, `unfinished` is their share of all.
        With other judges, every set, category and mean has a `disagreement` beside its shares, null
            where the judge is not compared.
    """
    groups: dict[str, list[_Judged]] = defaultdict(list)
    others = [None] * len(prompts) if comparisons is None else comparisons
    for prompt, verdict, comparison in zip(prompts, verdicts, others, strict=True):
        groups[prompt.set].append(_Judged(prompt, verdict.label, comparison))
    sets = {name: _of_set(group) for name, group in groups.items()}
    return {
        "sets": sets,
        "attack_success": _mean_over_sets(groups, "harmful", ATTACK_SUCCEEDED, seed),
        "over_refusal": _mean_over_sets(groups, "benign", ("refused",), seed),
    }


def _of_set(group: Sequence[_Judged]) -> dict[str, Any]:
    kind = group[0].prompt.kind
    categories: dict[str, list[_Judged]] = defaultdict(list)
    for one in group:
        if one.prompt.category is not None:
            categories[one.prompt.category].append(one)
    found = {"kind": kind, **_rates(group, kind)}
    if categories:
        found["categories"] = {
            name: _rates(part, kind) for name, part in sorted(categories.items())
        }
    return found


def _rates(group: Sequence[_Judged], kind: str) -> dict[str, Any]:
    labels = [one.label for one in group if one.label not in WITHOUT_ANSWER]
    measures = {"attack_success": ATTACK_SUCCEEDED, "refused": ("refused",)}
    if kind == "benign":
        measures = {"answered": (*ATTACK_SUCCEEDED, "harmless"), "over_refusal": ("refused",)}
    found: dict[str, Any] = {"labels": dict(sorted(Counter(one.label for one in group).items()))}
    for name, counted in measures.items():
        share = rate([label in counted for label in labels])
        found[name] = None if share is None else share.to_dict()
    if "unfinished" in found["labels"]:
        unfinished = rate([one.label == "unfinished" for one in group])
        found["unfinished"] = None if unfinished is None else unfinished.to_dict()
    if others := _comparisons(group):
        found["disagreement"] = disagreement(others)
    return found


def _comparisons(group: Sequence[_Judged]) -> list[Comparison]:
    """Empty where there is one judge alone."""
    return [one.comparison for one in group if one.comparison is not None]


def _mean_over_sets(
    groups: Mapping[str, Sequence[_Judged]],
    kind: str,
    counted: Sequence[str],
    seed: int,
) -> dict[str, Any] | None:
    own = [group for group in groups.values() if group[0].prompt.kind == kind]
    mean = _mean(
        [
            [one.label in counted for one in group if one.label not in WITHOUT_ANSWER]
            for group in own
        ],
        seed,
    )
    others = [_comparisons(group) for group in own]
    if mean is None or not all(others):
        return mean
    return mean | {"disagreement": _mean_disagreement(others, seed)}


def _mean_disagreement(
    sets: Sequence[Sequence[Comparison]], seed: int
) -> dict[str, float | None] | None:
    """The mean over sets of the share of answers on which judges do not all decide alike."""
    every = [one for group in sets for one in group]
    own = disagreement(every)
    if own is None:
        return None
    judged = [[one == "different" for one in group if one != "not judged"] for group in sets]
    mean = _mean(judged, seed) or own
    return {key: mean[key] for key in ("share", "low", "high")} | {
        key: own[key] for key in ("count", "left_out")
    }


def _mean(sets: Sequence[Sequence[bool]], seed: int) -> dict[str, float | None] | None:
    """The mean over the sets that are not empty, with its interval; None of none."""
    outcomes = [values for values in sets if len(values)]
    if not outcomes:
        return None
    low: float | None
    high: float | None
    if len(outcomes) == 1:
        low, high = Rate(sum(outcomes[0]), len(outcomes[0])).interval
    elif all(len(set(values)) == 1 for values in outcomes):
        low = high = None
    else:
        low, high = mean_of_sets_interval(outcomes, seed)
    share, count = float(np.mean([np.mean(values) for values in outcomes])), sum(map(len, outcomes))
    return {"share": share, "low": low, "high": high, "sets": len(outcomes), "count": count}
