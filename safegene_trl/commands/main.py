"""`safegene COMMAND …`: dispatches to the subcommands, and prints a `SafeGeneError` as one line."""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import RejectedError, SafeGeneError
from ..gate import EXIT_CODES


COMMANDS = {
    "sft": "fine-tune with TRL's SFTTrainer and the safety step at its end",
    "extract": "make a safety vector from an aligned and a degraded model",
    "apply": "recalibrate and merge a safety vector into a finished checkpoint or adapter",
    "evaluate": "measure refusals, over-refusal and utility of a checkpoint or adapter",
    "estimate": "tell a command's time, memory and disk before it runs",
    "combine": "make one safety vector of several, each with coefficients of its own",
    "similarity": "compare safety vectors of one family by their cosines",
    "sign": "sign a safety vector with an elliptic-curve key",
    "verify": "check a safety vector's signature",
    "history": "list a model line's releases and warn where refusals drift",
    "inspect": "say what a safety vector or a safeguarded checkpoint holds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code.

    0, 3 for a checkpoint that was accepted as best effort, 4 for one that was rejected, 2 for any other `SafeGeneError` or wrong usage.
    """
    words = sys.argv[1:] if argv is None else argv
    argv = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher puts it first
    if argv[:1] == ["--version"]:
        print(f"safegene-trl {version('safegene-trl')}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        listing = "\n".join(f"  {name:<11}{summary}" for name, summary in COMMANDS.items())
        print(f"usage: safegene COMMAND [options]\n\n{listing}\n\nsafegene COMMAND --help lists a command's options.")
        return 0 if argv[:1] in ([], ["-h"], ["--help"]) else 2
    command = importlib.import_module(f".{argv[0]}", package=__package__)
    try:
        return command.main(argv[1:])
    except SafeGeneError as error:
        if os.environ.get("RANK", "0") == "0":  # it knows what happened on the others
            print(f"safegene {argv[0]}: {error}", file=sys.stderr)
        return EXIT_CODES["rejected"] if isinstance(error, RejectedError) else 2


if __name__ == "__main__":
    raise SystemExit(main())
