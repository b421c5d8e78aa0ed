"""`safegene audit VECTOR`: in which categories, languages and forms a vector gives refusals back, and
in which not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..auditing.config import AuditConfig
from ..reporting.audit_page import MEASURE_WORDS, PAGE, VERDICT_WORDS, cell_words
from ..step.decision import EXIT_CODES
from ..text import printable
from ..vectors.audit_file import AUDIT_FILE, ROLES, read_audit
from .output import give
from .parsing import parse


def main(argv: Sequence[str]) -> int:
    """Writes `audit.json` and `audit.html`, and prints the cells; 4 where there are more blind spots
    than allowed.
    """
    (config,) = parse(
        (AuditConfig,),
        named_vector(argv),
        prog="safegene audit",
        description="Audit a safety vector: where it gives refusals back, and where it does not.",
    )
    config.check()  # the libraries that follow take seconds
    from ..auditing.audit import audit
    from ..distributed.processes import join_processes

    join_processes()
    found = audit(config)
    give(found, text(found, config.output_dir), [printable(each) for each in found["warnings"]])
    if config.max_blind_spots is None:
        return 0
    read_audit(Path(config.output_dir) / AUDIT_FILE).check_tells()
    return EXIT_CODES["rejected"] if found["blind_spots"] > config.max_blind_spots else 0


def named_vector(argv: Sequence[str]) -> list[str]:
    """A command line whose first word may be the vector, without the option's name."""
    return ["--vector", *argv] if argv and not argv[0].startswith("-") else list(argv)


def text(found: Mapping[str, Any], folder: str) -> str:
    """The cells as a table: shares in per cent."""
    lines = [f"{_counted(found)} {_held_against(found)}"]
    if found["fine_tune"]["stand_in"]:
        lines.append(
            "No fine-tune was given: the aligned model without the vector stands in for one, in memory only."
        )
    lines += [f"Warning: {printable(warning)}" for warning in found["warnings"]]
    measure = MEASURE_WORDS[found["measure"]].lower()
    names = [printable(cell_words(cell["where"])) for cell in found["cells"]]
    width = max(map(len, names), default=0)
    head = f"{'':<{width}}  {'verdict':<15}  {'attack success: aligned, fine-tuned, safeguarded':<50}{measure}"
    lines += ["", head.rstrip()]
    for name, cell in zip(names, found["cells"], strict=True):
        attacks = " → ".join(_percent(cell["attack_success"][role]) for role in ROLES)
        attacks += f" of {cell['prompts']}"
        verdict = VERDICT_WORDS[cell["verdict"]][0]
        lines.append(f"{name:<{width}}  {verdict:<15}  {attacks:<50}{_share(cell)}")
    if "before" in found:
        lines += ["", *_before(found["before"])]
    refusals = found["attacker"]["refusals"]
    lines += [
        "",
        f"Warning: whoever holds the vector can take refusals away with it: without it the aligned model holds "
        f"{_percent(refusals['without_vector'])} of these prompts, as it is {_percent(refusals['aligned'])}. "
        "Measured in memory; nothing of it was written.",
        f"{found['data']['left_out']} prompts left out, because they repeat what the vector or fine-tune was made with.",
        f"All numbers: {Path(folder) / AUDIT_FILE}; a page: {Path(folder) / PAGE}",
    ]
    return "\n".join(lines)


def _counted(found: Mapping[str, Any]) -> str:
    """How many cells there are of each verdict: without blind spots all is not fine."""
    verdicts = [cell["verdict"] for cell in found["cells"]]
    counts = [
        f"{verdicts.count(name)} {words}"
        for name, (words, _) in VERDICT_WORDS.items()
        if name != "blind_spot"
    ]
    return f"Blind spots: {found['blind_spots']} of {len(verdicts)} cells ({', '.join(counts)})."


def _held_against(found: Mapping[str, Any]) -> str:
    correction = found["correction"]
    return (
        f"Cells are held against {100 * found['least_share']:g} %, with p-values corrected for {correction['tested']} tested cells "
        f"({correction['method']}); a blind spot can be shown in cells of {correction['needed']} refusals or more. "
        f"Coefficients: {printable(found['coefficients']['source'])}. Judge: {printable(found['judges'][0]['name'])}."
    )


def _percent(share: Mapping[str, float] | None) -> str:
    return "–" if share is None else f"{100 * share['share']:.1f}%"


def _share(cell: Mapping[str, Any]) -> str:
    """The share that decides, with its corrected interval where the cell was tested."""
    share = cell["share"]
    if share is None:
        return "–"
    low, high = (share.get(f"{side}_corrected", share[side]) for side in ("low", "high"))
    return f"{_percent(share)} [{100 * low:.1f}, {100 * high:.1f}] of {share['count']}"


def _before(found: Mapping[str, Any]) -> list[str]:
    """What became of the earlier audit's cells: those that changed for sure, and blind spots."""
    lines = [f"Against {printable(found['name'])}, over the prompts of both:"]
    for cell in found["cells"]:
        verdicts = [cell[when]["verdict"] for when in ("before", "now")]
        if cell["changed"] or "blind_spot" in verdicts:
            words = " → ".join(VERDICT_WORDS[verdict][0] for verdict in verdicts)
            lines.append(
                f"  {printable(cell_words(cell['where']))}: {words}; attacks succeed no more on {cell['won']} and only now on {cell['lost']} "
                f"of {cell['paired']} (p {cell['p_corrected']:.3g}, corrected)"
            )
    return (
        lines
        if len(lines) > 1
        else [*lines, "  no cell changed for sure, and none was a blind spot"]
    )
