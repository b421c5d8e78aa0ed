"""`safegene apply --fleet models.yaml`: one vector, many finished fine-tunes, in parallel processes
within a memory budget.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.contents import FLEET_STATE, FLEET_WORKSHOP, MARKER
from ..checkpoints.locking import alone_in
from ..errors import SafeGeneError
from ..interruption import Interrupted
from ..reporting.cells import headings, measured_cells
from ..step.decision import EXIT_CODES
from ..text import one_line
from .fleet_file import Fleet
from .fleet_member import (
    FAILED,
    Member,
    member_of,
    newest_report,
    read_state,
    save_state,
    state_of,
)
from .fleet_pool import Pool
from .output import give
from .tables import aligned


__all__ = ["Fleet", "run_fleet"]
logger = logging.getLogger(__name__)


def run_fleet(path: Path) -> int:
    """Does all that is not done yet, prints a table, and returns the exit code of the worst
    outcome: 2 for one that failed.

    Raises:
        SafeGeneError: The file is wrong, or another fleet is at work in its folder; nothing is
            started then.
    """
    fleet = Fleet.read(path)
    folder = Path(fleet.output_dir)
    remedy = "wait for it, or end it and the processes that it left"
    with alone_in(folder / FLEET_WORKSHOP, "fleet", remedy) as lock:
        before = read_state(folder / FLEET_STATE)
        members = [member_of(fleet, entry, before) for entry in fleet.models]
        _estimate([member for member in members if not member.outcome])
        save_state(members, folder / FLEET_STATE)
        Pool(fleet, members, folder / FLEET_STATE, lock).run()
    give({"models": [state_of(member) for member in members]}, _table(members))
    outcomes = {member.outcome for member in members}
    return 2 if FAILED in outcomes else max(EXIT_CODES[outcome] for outcome in outcomes)


def _estimate(members: Sequence[Member]) -> None:
    """Memory of every member; those whose settings or files are wrong fail here, before anything is
    started.
    """
    from .estimate import estimate_apply

    for member in members:
        try:
            costs = estimate_apply(["--config", str(member.recipe)], timed=False)
            member.memory = max(cost.memory for cost in costs.values())
        except SafeGeneError as error:
            member.finish(FAILED, one_line(error))
        except Interrupted:
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever is wrong with one model, the others are done; argparse exits
            logger.exception("%s: the estimate failed", member.name)
            member.finish(FAILED, f"Its estimate failed: {type(error).__name__}: {one_line(error)}")


def _table(members: Sequence[Member]) -> str:
    rows = [["model", "outcome", *headings(), "seconds", "output"]]
    for member in members:
        place, report = (
            newest_report(member.target, member.outcome)
            if member.outcome in EXIT_CODES
            else (None, {})
        )
        output = str(member.target) if place == member.target / MARKER else ""
        measured = measured_cells(report.get("measured") or {})
        seconds = "already done" if member.done_before else f"{member.seconds:.0f}"
        rows.append([member.name, member.outcome, *measured, seconds, output])
    notes = [
        f"{m.name}: {one_line(m.message)}"
        for m in members
        if m.outcome not in ("accepted", "accepted_best_effort")
    ]
    return "\n".join([aligned(rows), *notes])
