"""A second audit against the first: what became of every cell."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from scipy.stats import binomtest

from ..errors import ConfigError
from ..evaluation.agreement import WITHOUT_ANSWER
from ..evaluation.statistics import holm
from ..judges import ATTACK_SUCCEEDED
from ..provenance import same_weights
from ..step.lineage import ROUNDING
from ..text import printable
from ..vectors.audit_file import SUMMARY, AuditRecord
from .cells import ALPHA, Labelled
from .config import AuditConfig


def check_comparable(
    before: AuditRecord, measure: str, config: AuditConfig, keys: Set[str]
) -> None:
    """Raises `ConfigError` for an earlier audit whose verdicts mean something else, or that has none of
    the prompts with these keys.

    Another judge, or answers of another length, would change labels by themselves, and that would
    pass for what the vector does. What the earlier audit does not say is not held against it.
    """
    for name, was, now in (
        ("measure", before.measure, measure),
        ("least_share", before.least_share, config.least_share),
        ("first judge", before.judge, config.judges[0]),
        ("max_new_tokens", before.max_new_tokens, config.max_new_tokens),
    ):
        if was is not None and was != now:
            raise ConfigError(
                f"The audit {before.name} has the {name} {printable(was)} and this one would have {printable(now)}, so that their verdicts "
                "do not compare: name a fine-tune in both or in neither, one `least_share`, one first judge and one `max_new_tokens`, or leave "
                "out `before`."
            )
    if not before.prompts.keys() & keys:
        raise ConfigError(
            f"The audit {before.name} has none of these prompts, so that nothing can be compared: name data sets that it was made "
            "with, or leave out `before`."
        )


def other_models(before: AuditRecord, now: Mapping[str, Any]) -> list[str]:
    """A sentence where two audits are, as far as they say, of other fine-tunes or coefficients: what
    changed between them need not come from the vector.

    Args:
        before: The earlier audit.
        now: What is in the later one's file.
    """
    others = []
    fine_tune, coefficients = now["models"].get("fine_tune", {}), now["coefficients"]
    same = same_weights(before.fine_tune or {}, fine_tune)
    if same is False or before.stand_in != now["fine_tune"]["stand_in"]:
        others.append("another fine-tune")
    own = [coefficients[name] for name in SUMMARY]
    if any(abs(a - b) > ROUNDING for a, b in zip(before.coefficients or own, own, strict=True)):
        others.append("other coefficients")
    if not others:
        return []
    return [
        f"The audit {_file_name(before)} is of {' and '.join(others)}: what changed since then can come from that."
    ]


def compared(
    before: AuditRecord, cells: Sequence[Mapping[str, Any]], rows: Sequence[Labelled]
) -> dict[str, Any]:
    """What a `before` says of the cells that both audits have.

    The prompts that both asked are compared one by one: by the exact McNemar test of attacks on the
    safeguarded model, two-sided and corrected by Holm over the cells.

    Args:
        before: The earlier audit.
        cells: Those of the later one.
        rows: The prompts of the later one.

    Returns:
        `name`, `sha256`, `weights` and `measure` of the earlier audit; `cells`: by cell its share and
            verdict then and now, and over `paired` prompts how many attacks succeed no more
            (`won`) and only now (`lost`), with the p-values; `gone` and `new`: names of blind
            spots; `only_before`: names of cells that this audit has not.
    """
    earlier = {tuple(sorted(cell.where.items())): cell for cell in before.cells}
    found = []
    for cell in cells:
        was = earlier.pop(tuple(sorted(cell["where"].items())), None)
        if was is not None:
            own = [row for row in rows if _is_in(row, cell["where"])]
            found.append(
                {
                    "where": cell["where"],
                    "before": {"share": was.share, "count": was.count, "verdict": was.verdict},
                    "now": {
                        "share": cell["share"] and cell["share"]["share"],
                        "count": cell["count"],
                        "verdict": cell["verdict"],
                    },
                    **_paired(before.prompts, own),
                }
            )
    corrected = holm({str(i): cell["p"] for i, cell in enumerate(found)})
    for i, cell in enumerate(found):
        cell["p_corrected"] = corrected[str(i)]
        cell["changed"] = corrected[str(i)] < ALPHA
    return {
        "name": _file_name(before),
        "sha256": before.sha256,
        "weights": before.weights,
        "measure": before.measure,
        "cells": found,
        "gone": [_words(cell) for cell in found if _turned(cell, "before", "now")],
        "new": [_words(cell) for cell in found if _turned(cell, "now", "before")],
        "only_before": [cell.name for cell in earlier.values()],
    }


def _file_name(before: AuditRecord) -> str:
    """Without its place on this machine."""
    return before.name.rsplit("/", 1)[-1]


def _is_in(row: Labelled, where: Mapping[str, str]) -> bool:
    """Whether a prompt belongs to a cell; where no form is named, in the direct one."""
    named = row.place.named
    return all(named.get(key) == value for key, value in ({"form": "direct"} | dict(where)).items())


def _paired(before: Mapping[str, str], rows: Sequence[Labelled]) -> dict[str, Any]:
    pairs = [
        (before[row.key] in ATTACK_SUCCEEDED, row.falls("safeguarded"))
        for row in rows
        if before.get(row.key, "unjudged") not in WITHOUT_ANSWER and row.is_judged
    ]
    won, lost = (pairs.count(change) for change in ((True, False), (False, True)))
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"paired": len(pairs), "won": won, "lost": lost, "p": p}


def _turned(cell: Mapping[str, Any], spot: str, other: str) -> bool:
    verdicts: tuple[str, str] = (cell[spot]["verdict"], cell[other]["verdict"])
    return verdicts[0] == "blind_spot" != verdicts[1]


def _words(cell: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in cell["where"].items())
