"""What a command puts out: its result, as text for people or by `--json` as one JSON document, and
what `--quiet` leaves of that.

A command hands its result to `give`, as a record and as text, and knows nothing else of this.
`main` takes the two options out of every command's words (`taken`), opens an `Output` around the
command, and lets it write the document, or that of an error, when all is done. Recipes may set both
(`set_by_recipe`); processes that a launcher starts are told of them by `passed_on`.
"""

import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TextIO, cast

from ..config.validation import written_path
from ..distributed.world_size import is_first_process
from ..errors import ConfigError
from ..progress import no_progress, progress_shown
from ..text import read_json, strict_json
from .library_noise import silenced


OPTIONS = ("--json", "--quiet")
MEANINGS = {
    "--json": "Print the result as one JSON document, and all else on standard error; with a FILE that ends in .json, or "
    "as --json=FILE, write it there and print as ever.",
    "--quiet": "Print no tables, progress bars and notes of libraries: errors and warnings stay.",
}
# their own argument may be such a file
_TAKE_JSON = ("history", "inspect")
_SWITCH = {"true": True, "false": False}


class Output:
    """How one command's result goes out.

    Attributes:
        command: The command.
        json: Whether its result is printed as JSON, or the file that it is written to.
        quiet: Whether it prints nothing else.
        named: What its words and its recipe name, which may be files that it reads.
        record: The result, once the command has given it.
    """

    def __init__(
        self,
        command: str,
        json: bool | Path = False,
        quiet: bool = False,
        named: Sequence[str] = (),
    ):
        self.command, self.json, self.quiet, self.named = command, json, quiet, list(named)
        self.record: Any = None
        self._may_write = False  # the document's file, which is none that is read
        self._held = ExitStack()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, `give` goes here, and standard output is kept for the document."""
        token = _OUTPUT.set(self)
        try:
            with self._held:
                self._hold()
                yield
        finally:
            _OUTPUT.reset(token)

    def change(self, json: bool | Path | None, quiet: bool | None) -> None:
        """Takes on what is not None, where the words of the command said nothing."""
        self.json, self.quiet = self.json or json or False, self.quiet or quiet or False
        self._held.close()
        self._hold()

    def write(self, code: int) -> None:
        """Writes the document, where one is wanted."""
        if not self.json:
            return
        if self.record is None:
            if code:  # of launched processes that were killed
                self.fail(f"It ended with exit code {code}: standard error says why.", code)
        elif isinstance(self.json, Path):
            from ..checkpoints.atomic_writes import replace_file

            replace_file(self.json, strict_json(self.record) + "\n")
        else:
            print(strict_json(self.record), flush=True)

    def fail(self, message: str, code: int, report: Any = None) -> None:
        """Writes the document of an error, or the report that the error came with. It replaces an
        earlier document, which would pass for this one's, and no other file.
        """
        if not is_first_process():
            return
        if isinstance(self.json, Path) and not (self._may_write and _is_document(self.json)):
            return
        self.record = {"error": message, "exit_code": code} if report is None else report
        self.write(code)

    def _hold(self) -> None:
        self._held.enter_context(progress_shown(is_first_process()))
        if isinstance(self.json, Path):
            from ..checkpoints.preflight import check_outputs

            self._may_write = False
            check_outputs([self.json], _files(self.named))
            self._may_write = True
        if self.quiet:
            self._held.enter_context(no_progress())
            self._held.enter_context(silenced())
            self._held.enter_context(_nothing_printed())
        elif self.json is True:
            self._held.enter_context(_standard_output_to(sys.stderr))


_OUTPUT: ContextVar[Output | None] = ContextVar("output", default=None)


def give(record: Any, text: str, warnings: Sequence[str] = ()) -> None:
    """Hands over a command's result.

    Args:
        record: What `--json` writes: JSON values with names that stay.
        text: What people read.
        warnings: What of the text is said even with `--quiet`, on standard error then.
    """
    output = _OUTPUT.get()
    if output is not None:
        output.record = record
    if text and not (output and output.quiet):
        print(text, flush=True)
    for warning in warnings if output and output.quiet else ():
        print(f"warning: {warning}", file=sys.stderr)


def json_file() -> Path | None:
    """The file that the running command's document goes to, if it goes to one."""
    output = _OUTPUT.get()
    return output.json if output is not None and isinstance(output.json, Path) else None


def taken(argv: Sequence[str]) -> tuple[Output, list[str]]:
    """The output that a command's words ask for, and its other words. The options may stand before
    the command and anywhere behind it. With `--help` they mean nothing.

    Raises:
        ConfigError: One is there twice, or has a value that is none.
    """
    if {"-h", "--help"} & set(argv):
        return Output(""), [word for word in argv if word not in OPTIONS]
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        name, equals, value = words[0].partition("=")
        if name not in OPTIONS:
            rest.append(words.pop(0))
            continue
        del words[0]
        if not equals and words and _is_value(name, words[0], rest):
            equals, value = "=", words.pop(0)
        if name in found:
            raise ConfigError(f"`{name}` is on the command line twice: leave one of them out.")
        found[name] = _meant(name, value) if equals else True
    json, quiet = (found.get(name, False) for name in OPTIONS)
    values = [part for word in rest for part in (word, word.partition("=")[2])]
    return Output(rest[0] if rest else "", json, quiet, values), rest


def _is_value(name: str, word: str, before: Sequence[str]) -> bool:
    """Whether the word behind an option is its value, and none of the command's own."""
    if word.lower() in _SWITCH:
        return True
    return name == "--json" and word.endswith(".json") and (*before, "")[0] not in _TAKE_JSON


def _meant(name: str, value: Any) -> bool | Path:
    """What an option, or a key of a recipe, is set to.

    Raises:
        ConfigError: It is neither true nor false nor, for `json`, a file that can be written.
    """
    meant = _SWITCH.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(meant, bool):
        return meant
    if "json" in name and isinstance(meant, str) and meant.endswith(".json") and "\0" not in meant:
        return written_path(meant)
    either = "true, false or a file that ends in .json" if "json" in name else "true or false"
    raise ConfigError(f"`{name}` is {value!r}: it must be {either}.")


def set_by_recipe(recipe: MutableMapping[str, Any], prog: str) -> None:
    """Takes `json` and `quiet` out of a recipe; the running command follows them, unless it only
    reckons what another one would take.
    """
    found = {name: _meant(name, recipe.pop(name)) for name in ("json", "quiet") if name in recipe}
    output = _OUTPUT.get()
    if output is None:
        return
    output.named += _texts(recipe)
    if prog != f"safegene {output.command}":
        found = {}
    if found or isinstance(output.json, Path):
        output.change(found.get("json"), bool(found.get("quiet")))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a recipe."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for own in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(own)


def _is_document(path: Path) -> bool:
    """Whether nothing is there, or a JSON document."""
    try:
        read_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _files(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        with suppress(OSError, ValueError):  # too long, or no name of a file
            if name and Path(name).is_file():
                yield Path(name)


@contextmanager
def passed_on() -> Iterator[list[str]]:
    """The options for the processes that a launcher starts. The first of them writes its document
    to a file, which becomes this process's.
    """
    output = _OUTPUT.get() or Output("")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = ["--quiet"] if output.quiet else []
        yield [*words, f"--json={file}"] if output.json else words
        with suppress(FileNotFoundError):  # of other machines, or killed
            output.record = read_json(file.read_text(encoding="utf-8"))


class _TakenBefore(Action):
    """An option that `--help` lists and `taken` has taken; what is left of it was cut short."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        raise ConfigError(f"`{self.option_strings[0]}` is cut short: write it out.")


def list_options(parser: ArgumentParser) -> None:
    """Puts the options into a parser's help."""
    group = parser.add_argument_group("output", "What every command takes, anywhere on its line.")
    shared: dict[str, Any] = {"action": _TakenBefore, "default": SUPPRESS}
    for name, meaning in MEANINGS.items():
        shape = {"nargs": "?", "metavar": "FILE"} if name == "--json" else {"nargs": 0}
        group.add_argument(name, help=meaning, **shape, **shared)


@contextmanager
def _nothing_printed() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, _standard_output_to(nowhere):
        yield


@contextmanager
def _standard_output_to(stream: TextIO) -> Iterator[None]:
    """Standard output goes to a stream that has a descriptor: what Python prints, and where this is
    the process's own, what libraries in C and subprocesses write.
    """
    own = cast(TextIO | None, sys.stdout)
    if own is None:  # it was closed before the command began
        yield
        return
    replaced = own is not sys.__stdout__  # by a program that runs the command
    with redirect_stdout(stream):
        if replaced:
            yield
            return
        own.flush()
        number = own.fileno()
        kept = os.dup(number)
        os.dup2(stream.fileno(), number)
        try:
            yield
        finally:
            with suppress(OSError):  # nobody reads it
                own.flush()
            os.dup2(kept, number)
            os.close(kept)
