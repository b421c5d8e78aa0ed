"""What libraries say of themselves while a command is at work, and that asks nothing of its user: held
back line by line, each by the logger or warning that it comes from.

Only commands, the quickstart and what it starts do this; a training of somebody else's is left as it
is.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager


# by logger, words of what it says
LOGGED = {
    # PEFT imports it, and on some CPUs it uses kernels of its own
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # it was not asked for a GPU
    "DeepSpeed": "Setting accelerator to CPU",
    # a launch on a CPU shares it out
    "torch.distributed.run": "Setting OMP_NUM_THREADS environment variable for each process to be 1",
}
# by kind, how what it says begins
WARNED: tuple[tuple[type[Warning], str], ...] = (
    # TRL's and PEFT's own use of names that transformers has given others
    (FutureWarning, "`(is_)?gradient_checkpointing` is deprecated"),
    # the trainer's default, on a machine without a GPU
    (UserWarning, "'pin_memory' argument is set as true but no accelerator is found"),
    # accelerate's own use of a name that torch has given another
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated"),
    # `estimate` times copies of a model, which have no name
    (UserWarning, "The PEFT config's `base_model_name_or_path` was renamed from '.*' to 'None'"),
)
# what libraries read as they are imported
WAITING_BARS = {"TQDM_DELAY": "2"}  # seconds, as our own bars wait
NO_BARS = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
ERRORS_ONLY = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


def hold_back() -> None:
    """Holds back `LOGGED` and `WARNED`, and bars of what is done in two seconds, from now on: to be
    called before the libraries are imported.
    """
    for name, words in LOGGED.items():
        logging.getLogger(name).addFilter(_Without(words))
    for kind, beginning in WARNED:
        warnings.filterwarnings("ignore", message=beginning, category=kind)
    for name, value in WAITING_BARS.items():
        os.environ.setdefault(name, value)


@contextmanager
def held_back() -> Iterator[None]:
    """`hold_back`, while it is open."""
    filters = {name: list(logging.getLogger(name).filters) for name in LOGGED}
    with warnings.catch_warnings(), _environment({}):
        hold_back()
        try:
            yield
        finally:
            for name, before in filters.items():
                logging.getLogger(name).filters[:] = before


@contextmanager
def silenced() -> Iterator[None]:
    """While open, libraries say nothing but errors, and show no bars; what this package warns of is
    said.
    """
    loud = _NotOurs()
    with warnings.catch_warnings(), _environment(NO_BARS | ERRORS_ONLY), ExitStack() as loaded:
        _silence_loaded(loaded)
        warnings.filterwarnings("ignore", module=r"(?!safegene_trl\b)")
        if logging.lastResort is not None:
            logging.lastResort.addFilter(loud)
        try:
            yield
        finally:
            if logging.lastResort is not None:
                logging.lastResort.removeFilter(loud)


def _silence_loaded(undone: ExitStack) -> None:
    """The same for libraries that read their environment before; `undone` puts it back."""
    if (transformers := sys.modules.get("transformers.utils.logging")) is not None:
        undone.callback(transformers.set_verbosity, transformers.get_verbosity())
        transformers.set_verbosity_error()
        if transformers.is_progress_bar_enabled():
            undone.callback(transformers.enable_progress_bar)
            transformers.disable_progress_bar()
    datasets = sys.modules.get("datasets.utils")
    if datasets is not None and not datasets.are_progress_bars_disabled():
        undone.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables, and puts back all that are set while it is open."""
    names = [*values, *WAITING_BARS]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Without(logging.Filter):
    """Lets pass what does not have these words."""

    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


class _NotOurs(logging.Filter):
    """Lets pass errors, and what this package says."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name.startswith("safegene_trl")
