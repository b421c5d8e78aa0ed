"""The safety step, in one order for every fine-tune: find, decide, write, verify, record.

Whatever goes wrong in it ends in a failure report beside the checkpoint that is not there; the
fine-tune itself is never touched.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_writes import atomic_directory
from ..checkpoints.hub import upload
from ..checkpoints.places import FAILURE_SUFFIXES, failure_path
from ..errors import RejectedError, SafeGeneError, UnexpectedError
from ..interruption import terminable
from ..models.batch_size import is_out_of_memory
from ..provenance import sha256_of_files
from ..reporting.report import write_evidence, write_report
from ..text import one_line
from .decision import Decision, dependent, prompts_of_vector, unfinished
from .history import Release, append_release, prepared_release, read_history, release_of
from .lineage import check_no_subtraction
from .notification import notify
from .plan import FineTune, Found, Plan
from .repair import BOTH


logger = logging.getLogger(__name__)


def run(plan: Plan, fine_tune: FineTune) -> dict[str, Any]:
    """Finds the coefficients, decides, writes the checkpoint and verifies it; returns its report.

    Collective. After any failure, an interruption included, the report of what was known goes to
    `failure_path`, and no checkpoint is left, but where only its upload failed. What came of it is
    added to `config.output.history`, whose space on the disk is taken before the checkpoint
    appears.

    Raises:
        RejectedError: No coefficients are acceptable, or the gate's limits are not kept. No
            checkpoint is written.
        UnexpectedError: Something failed that this package did not expect.
        SafeGeneError: Another of its kinds, saying what to do.
    """
    with plan.sharding.naming_rank(), _reported(plan):
        plan.report.fine_tune = str(fine_tune.keep())
        found = fine_tune.find()
        plan.report.coefficients = found.coefficients
        plan.report.decision = {**found.decision.to_dict(), "scale": found.scale}
        rejected = found.decision.outcome == "rejected"
        if rejected and not (plan.config.gate and plan.config.gate.write_rejected):
            _add_to_history(plan)
            raise RejectedError(_rejection(plan, found.decision))
        change = {name: value - plan.carried[name] for name, value in found.coefficients.items()}
        check_no_subtraction(change, plan.carried)
        _write(plan, fine_tune, found)
        with plan.sharding.on_main_rank() as working:
            if working and plan.config.output.hub_model_id and not rejected:
                upload(plan.target, plan.config.output.hub_model_id, plan.config.output.hub_private)
    return plan.report.to_dict()


def _write(plan: Plan, fine_tune: FineTune, found: Found) -> None:
    sharding = plan.sharding
    with ExitStack() as held:
        # what may still fail of the history fails before the checkpoint takes its place
        add = _written(plan, fine_tune, found, held)
        with sharding.raising_together():
            add()
    if sharding.is_main:
        _remove_failure(plan.target)


def _written(plan: Plan, fine_tune: FineTune, found: Found, held: ExitStack) -> Callable[[], None]:
    """Puts the checkpoint in its place; what is given then adds it to the history, which `held`
    keeps locked.
    """
    sharding, report, add = plan.sharding, plan.report, _nothing
    with atomic_directory(plan.target, job=sharding) as folder:
        with plan.clock.phase("save"):
            digests = fine_tune.write(folder, found)
        with plan.clock.phase("verify"):
            with sharding.on_main_rank() as working:
                if working:
                    report.files = hashes(folder, digests)
            report.shipped = (report.shipped or {}) | fine_tune.compare(folder)
        report.status = "safeguarded"
        with sharding.raising_together():
            if sharding.is_main:
                write_evidence(report.to_dict(), folder, plan.target.name, _releases(plan))
                if plan.config.output.history:
                    release = release_of(report.to_dict(), plan.target)
                    add = held.enter_context(
                        prepared_release(Path(plan.config.output.history), release)
                    )
    return add


def _nothing() -> None:
    """What a line without a history has to add."""


def hashes(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path there.

    `known` are those of its own files that need not be read.
    """
    files = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    unread = [name for name in files if name not in known]
    read = sha256_of_files([files[name] for name in unread])
    found = {**known, **dict(zip(unread, read, strict=True))}
    return {name: found[name] for name in files}


@contextmanager
def _reported(plan: Plan) -> Iterator[None]:
    """Whatever leaves the block has been written to the failure report; what is not one of our
    errors becomes one.
    """
    try:
        with terminable():
            yield
    except SafeGeneError as error:
        _write_failure(plan, error)
        if isinstance(error, RejectedError):
            error.report = plan.report.to_dict()
        raise
    except Exception as error:
        failure = _unexpected(plan, error)
        _write_failure(plan, failure)
        raise failure from error
    except BaseException as error:  # Ctrl-C, SIGTERM: the process ends, and says what it was at
        _write_failure(plan, error)
        if plan.sharding.is_main and plan.report.fine_tune:
            logger.warning(
                "The safety step was interrupted. %s is the plain fine-tune: `safegene apply` runs the step on it without training "
                "again. The report is %s.",
                plan.report.fine_tune,
                failure_path(plan.target),
            )
        raise


def _unexpected(plan: Plan, error: Exception) -> SafeGeneError:
    together = plan.sharding.world_size == 1 or getattr(error, "on_all_ranks", False)
    place = plan.report.fine_tune
    kept = (
        f" The fine-tune itself is in {place}."
        if place
        else " The fine-tune itself may not be on a disk yet."
    )
    saved = "the saved fine-tune" if place else "the fine-tune, once it is saved"
    if is_out_of_memory(error):
        return UnexpectedError(
            f"The safety step ran out of memory: run `safegene apply` on {saved}, on a machine with more of it, or set fewer "
            f"shots.{kept}",
            together,
        )
    return UnexpectedError(
        f"The safety step failed unexpectedly ({type(error).__name__}: {one_line(error)}): run `safegene apply` on {saved}, and "
        f"report this error.{kept}",
        together,
    )


def _remove_failure(target: Path) -> None:
    """Removes what an earlier failed run has left beside the checkpoint, which is finished whether
    that can be removed or not.
    """
    for suffix in FAILURE_SUFFIXES:
        path = target.with_name(target.name + suffix)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of an earlier run and cannot be removed: %s", path, error)


def _rejection(plan: Plan, decision: Decision) -> str:
    """Says first that it was rejected and by what, then what lies where, then what to do."""
    broken = [check for check in decision.checks if check.verdict == "broken"]
    if broken:
        why = f"the gate's limits are not kept ({'; '.join(map(str, broken))})"
        remedy = "give more safety data, use a stronger vector, or set `gate.write_rejected`"
        if plan.config.search.repair != BOTH:
            remedy = f"set `search.repair: {BOTH}`, {remedy}"
    elif unseen := unfinished(plan.report.measured):
        why, _, remedy = unseen.rstrip(".").partition(": ")
    else:
        why = decision.reason[0].lower() + decision.reason[1:].rstrip(".")
        remedy = (
            "give other or more safety data, allow a larger `search.max_utility_loss`, or use a stronger vector; a fine-tune "
            "that needs no repair passes where a `gate` says what it must keep"
        )
    said = (
        f"The safeguarded checkpoint was rejected, because {why}: nothing was written to {plan.target}, the report is "
        f"{failure_path(plan.target)}, and {plan.report.fine_tune} is the plain fine-tune, without the vector; {remedy}."
    )
    gate, measured_on = plan.config.gate, (plan.report.data or {}).get("unseen")
    if broken and measured_on and (own := prompts_of_vector(gate, measured_on)):
        said += f" {dependent(gate, own)}"
    return said


def _releases(plan: Plan) -> list[Release]:
    """The model line as it will be with this release; empty where none is kept."""
    if not plan.config.output.history:
        return []
    earlier = read_history(Path(plan.config.output.history))
    return (
        [*earlier, release_of(plan.report.to_dict(), plan.target)]
        if plan.report.decision
        else earlier
    )


def _add_to_history(plan: Plan) -> None:
    with plan.sharding.raising_together():
        if plan.sharding.is_main and plan.config.output.history:
            append_release(
                Path(plan.config.output.history), release_of(plan.report.to_dict(), plan.target)
            )


def _write_failure(plan: Plan, error: BaseException) -> None:
    """Writes what was known and what failed to `failure_path`, on rank 0. That it cannot be written
    hides no error.
    """
    plan.report.status = "failed"
    plan.report.error = {
        "kind": type(error).__name__,
        "message": str(error) or "The run was interrupted.",
    }
    if not plan.sharding.is_main:
        return
    try:
        write_report(plan.report.to_dict(), failure_path(plan.target), _releases(plan))
    except Exception as unwritten:  # a full disk may be what failed
        logger.warning("%s cannot be written: %s", failure_path(plan.target), unwritten)
    notify(plan.report.to_dict(), failure_path(plan.target))
