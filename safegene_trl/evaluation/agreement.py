"""How far several judges agree on the same answers, on the decision that they have in common.

A judge that sees harm does not tell a refusal from a harmless answer. So judges are compared on
whether an attack succeeded, for which a judge of refusals takes what is no refusal; on benign
prompts, on whether the answer is a refusal, and there only those that see refusals.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from ..data.prompts import Prompt
from ..judges import ATTACK_SUCCEEDED, Verdict
from ..judges.intervals import rate
from .statistics import kappa


WITHOUT_ANSWER = ("unjudged", "unfinished")  # nothing is known of these answers
# What several judges say of one answer, beside what one of them says. `not judged` by all of them;
# `not compared`: no other judge decides the same.
Comparison = Literal["same", "different", "not judged", "not compared"]
Sees = Literal["refusals", "harm"]
KINDS = ("harmful", "benign")


def compared(sees: Mapping[str, Sees], kind: str) -> list[str]:
    """The judges whose decisions on prompts of a kind can be held against each other; none where
    there are not two.

    Args:
        sees: By judge, what it sees.
        kind: `harmful` or `benign`.
    """
    names = [name for name, own in sees.items() if kind == "harmful" or own == "refusals"]
    return names if len(names) > 1 else []


def comparisons(
    prompts: Sequence[Prompt],
    verdicts: Mapping[str, Sequence[Verdict]],
    sees: Mapping[str, Sees],
) -> dict[str, list[Comparison]]:
    """By judge: of every prompt's answer, whether the judges that are compared on it all decide
    alike.
    """
    names = {kind: compared(sees, kind) for kind in KINDS}
    every = [
        _comparison([_decision(prompt, verdicts[name][i]) for name in names[prompt.kind]])
        for i, prompt in enumerate(prompts)
    ]
    return {
        name: [
            own if name in names[prompt.kind] else "not compared"
            for prompt, own in zip(prompts, every, strict=True)
        ]
        for name in sees
    }


def _decision(prompt: Prompt, verdict: Verdict) -> bool | None:
    """Whether the attack succeeded, or the benign prompt was refused; None where nothing is known."""
    if verdict.label in WITHOUT_ANSWER:
        return None
    counted = ATTACK_SUCCEEDED if prompt.kind == "harmful" else ("refused",)
    return verdict.label in counted


def _comparison(decisions: Sequence[bool | None]) -> Comparison:
    if None in decisions:
        return "not judged"
    return "different" if len(set(decisions)) > 1 else "same"


def disagreement(found: Sequence[Comparison]) -> dict[str, float | int | None] | None:
    """Share (0–1) of the answers on which judges do not all decide alike.

    Returns:
        `share`, with `low` and `high` of Wilson's 95 % interval, of `count` answers that all of
        them judged (the three are null of none); `left_out`: how many of the others there are.
        None where judges are not compared.
    """
    if "not compared" in found:
        return None
    of_all = rate([one == "different" for one in found if one != "not judged"])
    own = {} if of_all is None else of_all.to_dict()
    shown = {key: own.get(key) for key in ("share", "low", "high")}
    count = 0 if of_all is None else of_all.count
    return {**shown, "count": count, "left_out": len(found) - count}


def agreement(
    prompts: Sequence[Prompt],
    verdicts: Mapping[str, Sequence[Verdict]],
    sees: Mapping[str, Sees],
) -> list[dict[str, Any]]:
    """Cohen's κ between every two judges, over the answers that both judged and are compared on."""
    table = []
    for first, second in combinations(verdicts, 2):
        both = {name: sees[name] for name in (first, second)}
        kinds = [kind for kind in KINDS if compared(both, kind)]
        pairs = [
            (_decision(prompt, a), _decision(prompt, b))
            for prompt, a, b in zip(prompts, verdicts[first], verdicts[second], strict=True)
            if prompt.kind in kinds
        ]
        pairs = [pair for pair in pairs if None not in pair]
        same = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
        value = kappa([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
        table.append(
            {"judges": [first, second], "answers": len(pairs), "agreement": same, "kappa": value}
        )
    return table
