"""`safegene demo FOLDER`: a page in the browser in which the aligned model, the fine-tune and the
safeguarded one answer the same prompt.
"""

import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from threading import Event

from ..demonstration.config import DemoConfig
from ..demonstration.privacy import keep_to_this_machine
from ..distributed.world_size import launched_processes
from ..errors import ConfigError
from ..text import printable
from .output import give
from .parsing import parse


def main(argv: Sequence[str]) -> int:
    """Prints the address, and serves the page until Ctrl-C."""
    if argv and not argv[0].startswith("-"):
        argv = ["--safeguarded", *argv]
    (config,) = parse(
        (DemoConfig,),
        argv,
        prog="safegene demo",
        description="See what the safety step does: aligned, fine-tuned and safeguarded side by side, in a browser.",
    )
    config.check()
    if launched_processes() > 1:
        raise ConfigError("A demo is one process's work: leave out the launcher.")
    if find_spec("gradio") is None:
        raise ConfigError("The demo needs Gradio: pip install 'safegene-trl[demo]'.")
    keep_to_this_machine()
    from ..demonstration.page import free_port, served
    from ..demonstration.side_by_side import load_side_by_side

    free_port(config.port)  # before minutes are spent on models
    models = load_side_by_side(config)
    # it is meant to end by Ctrl-C
    with served(models, config.port) as address, suppress(KeyboardInterrupt):
        record = {"release": config.release, "address": address}
        give(record, f"{printable(config.release)}: {address} (until Ctrl-C)")
        if not config.no_browser:
            webbrowser.open(address)
        Event().wait()
    return 0
