"""`safegene COMMAND …`: dispatches to the subcommands, and ends each of their errors with one plain
line.
"""

import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from ..config.validation import nearest
from ..distributed.world_size import is_first_process
from ..errors import ConfigError, RejectedError, SafeGeneError, UnexpectedError
from ..interruption import Interrupted, interruptible
from ..step.decision import EXIT_CODES
from ..text import one_line
from .library_noise import held_back
from .output import MEANINGS, OPTIONS, Output, give, taken


COMMANDS = {
    "init": "write the recipe of a model family, with settings that fit its size",
    "sft": "fine-tune with TRL's SFTTrainer and the safety step at its end",
    "extract": "make a safety vector: of an aligned and a degraded model, or of another model's direction",
    "apply": "recalibrate and merge a safety vector into a finished checkpoint or adapter",
    "evaluate": "measure refusals, over-refusal and utility of a checkpoint or adapter",
    "audit": "tell where a safety vector gives refusals back, and where it does not",
    "demo": "show aligned, fine-tuned and safeguarded side by side in a browser",
    "estimate": "tell a command's time, memory and disk before it runs",
    "combine": "make one safety vector of several, each with coefficients of its own",
    "similarity": "compare safety vectors of one family by their cosines",
    "sign": "sign a safety vector with an elliptic-curve key",
    "verify": "check a safety vector's signature",
    "history": "list a model line's releases and warn where refusals drift",
    "inspect": "say what a safety vector or a safeguarded checkpoint holds",
    "completion": "print what lets a shell complete commands, options and file names",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code.

    0, 3 for a checkpoint that was accepted as best effort, 4 for one that was rejected, 2 for any
    other `SafeGeneError` or wrong usage, 1 for an error that nothing here foresaw, 130 after
    Ctrl-C, 141 where nobody reads the output any more. SIGTERM and SIGHUP end it by `SystemExit`,
    with 143 and 129.
    """
    words = sys.argv[1:] if argv is None else argv
    # DeepSpeed's launcher puts it first
    argv = [word for word in words if not word.startswith("--local_rank=")]
    first = next((word for word in argv if word.partition("=")[0] not in OPTIONS), "")
    name = f"safegene {first}" if first in COMMANDS else "safegene"
    output = Output("", json="--json" in argv)  # until its words are read
    try:
        output, argv = taken(argv)
        with interruptible(), held_back(), output.opened():
            code = _run(argv)
            if sys.stdout is not None:  # closed before the command began
                sys.stdout.flush()
        output.write(code)
        return code
    except Interrupted as ending:
        _end(output, name, f"ended by {ending.signal}.", int(ending.code or 0))
        raise
    except SystemExit:  # a dry run's
        output.write(0)
        raise
    except KeyboardInterrupt:
        return _end(output, name, "interrupted.", 128 + signal.SIGINT)
    except SafeGeneError as error:
        return _end_by_ours(output, name, error)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 128 + signal.SIGPIPE
        _say(traceback.format_exc())
        what = f"it failed by an error that was not foreseen ({type(error).__name__}: {one_line(error)})"
        return _end(output, name, f"{what}: what led to it stands above.", 1)


def _end(output: Output, name: str, said: str, code: int, report: Any = None) -> int:
    """Says how a command ends, on standard error and as its document; its exit code."""
    _say(f"{name}: {said}")
    with suppress(OSError, SafeGeneError):  # nobody reads it, or its file cannot be written
        output.fail(said, code, report)
    return code


def _end_by_ours(output: Output, name: str, error: SafeGeneError) -> int:
    code, report = 2, None
    if isinstance(error, RejectedError):
        code, report = EXIT_CODES["rejected"], error.report
    if not is_first_process():  # the first one knows what happened on the others
        return code
    if error.__cause__ is not None and isinstance(error, UnexpectedError):
        _say("".join(traceback.format_exception(error.__cause__)))
    return _end(output, name, one_line(error), code, report)


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["--version"]:
        give({"version": version("safegene-trl")}, f"safegene-trl {version('safegene-trl')}")
        return 0
    if argv[:1] in ([], ["-h"], ["--help"]):
        listing = "\n".join(f"  {name:<11}{summary}" for name, summary in COMMANDS.items())
        options = "\n".join(f"  {name:<11}{meaning}" for name, meaning in MEANINGS.items())
        print(
            f"usage: safegene COMMAND [options]\n\n{listing}\n\nEvery command takes\n{options}\n\n"
            "safegene COMMAND --help lists a command's options."
        )
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(
            f"There is no command `{argv[0]}`{nearest(argv[0], COMMANDS)} `safegene --help` lists the commands."
        )
    return importlib.import_module(f".{argv[0]}", package=__package__).main(argv[1:])


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads; what is still to be written to it goes
    nowhere then.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (
        OSError,
        ValueError,
    ):  # a program that runs the command has put something else in its place
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)  # else the interpreter complains when it flushes at its end
    os.close(nowhere)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
