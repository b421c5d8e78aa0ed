"""How many samples a pass takes: as many as memory is for, and fewer where it runs out all the
same.
"""

import gc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from transformers import PreTrainedModel

from ..distributed.layouts import Sharding
from ..distributed.memory import free_bytes, has_own_memory
from ..errors import ConfigError, MemoryShortageError
from .inputs import Sample


logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_WORDS = (
    "out of memory",
    "OutOfMemoryError",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "CUDNN_STATUS_NOT_SUPPORTED",  # as `auto_find_batch_size` has it
    "Allocation failed",
)


ON_CPU = 8  # more at once is no faster there
LARGEST, LARGEST_ANSWERING = 64, 128
SHARE = 0.5  # of the memory that is free
_LAYER_FACTOR = 17  # numbers that a layer keeps for a backward pass, per token and hidden unit (arXiv 2205.05198, 4.1)
_FEWEST_TOKENS = 32  # of a sample that says anything
_LOGIT_COPIES = 3  # the logits, their gradient and a reference's; see `losses.py` for the rest


def fitting(
    wanted: int | None, model: PreTrainedModel, tokens: int, responses: int, sharding: Sharding
) -> int:
    """Collective: how many samples to put through forward and backward passes at once, the same on
    every rank.

    Args:
        wanted: What the user asks for; None leaves it to the device. On a CPU that is 8.
        model: For its sizes.
        tokens: Of the longest sample.
        responses: Of those, tokens whose logits are needed.
        sharding: How the model is spread over ranks.
    """
    sizes = model.config.get_text_config()
    layer = tokens * sizes.hidden_size * _LAYER_FACTOR * model.dtype.itemsize
    logits = responses * sizes.vocab_size * model.dtype.itemsize
    return wanted or _most(
        layer * sizes.num_hidden_layers + _LOGIT_COPIES * logits, LARGEST, sharding
    )


def fitting_answers(
    wanted: int | None,
    model: PreTrainedModel,
    tokens: int,
    responses: int,
    sharding: Sharding,
    on_cpu: int = ON_CPU,
) -> int:
    """Collective: the same without backward passes: for prompts that are answered, `tokens` with
    their answers. On a CPU it is `on_cpu`.
    """
    sizes = model.config.get_text_config()
    layer = tokens * sizes.hidden_size * _LAYER_FACTOR * model.dtype.itemsize
    cache = 2 * tokens * sizes.hidden_size * sizes.num_hidden_layers * model.dtype.itemsize
    logits = responses * sizes.vocab_size * 4
    return wanted or _most(layer + cache + 2 * logits, LARGEST_ANSWERING, sharding, on_cpu)


def _most(per_sample: int, largest: int, sharding: Sharding, on_cpu: int = ON_CPU) -> int:
    if not has_own_memory(sharding.device):
        return on_cpu
    room = int(SHARE * free_bytes(sharding.device))
    return sharding.least(min(max(room // per_sample, 1), largest))


def check_room(
    wanted: int | None,
    model: PreTrainedModel,
    samples: Iterable[Sample],
    lowest: int,
    sharding: Sharding,
) -> None:
    """Collective: before anything is computed, that samples can be put through at all.

    Held against what is free now is the least that forward and backward passes hold: the states
    between layers, the logits and their gradient. What passes is not sure to fit.

    Args:
        wanted: The batch size that the user asks for; None leaves it to the device, down to 1.
        model: For its sizes.
        samples: All that will be put through.
        lowest: The lowest layer that a backward pass goes through.
        sharding: How the model is spread over ranks.

    Raises:
        MemoryShortageError: One sample does not fit.
        ConfigError: The batches that were asked for do not.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return  # what one device has does not tell
    sizes, number = model.config.get_text_config(), model.dtype.itemsize
    per_token = (sizes.num_hidden_layers - lowest) * sizes.hidden_size * number
    per_answer = 2 * sizes.vocab_size * number
    needs = sorted(
        (len(s.input_ids) * per_token + sum(s.is_response) * per_answer for s in samples),
        reverse=True,
    )
    free = -sharding.least(-_available(sharding))  # of the rank that has most
    needed = needs[0] if needs[0] > free else sum(needs[: wanted or 1])
    if needed <= free:
        return
    said = (
        f"at least {needed:,} bytes beside the model and {free:,} are free now, whatever a training will take: "
        f"{needed - free:,} bytes are missing, so "
    )
    if needed == needs[0]:
        tokens = free // (per_token + per_answer)
        fits = f"set `data.max_length: {tokens}`, or " if tokens >= _FEWEST_TOKENS else ""
        raise MemoryShortageError(
            f"The safety step needs for its longest sample {said}{fits}take a device with more memory."
        )
    at_once = sum(total <= free for total in itertools.accumulate(needs))
    raise ConfigError(
        f"The safety step needs for a batch of `batch_size: {wanted}` {said}set `batch_size: {at_once}`, or leave it out."
    )


def _available(sharding: Sharding) -> int:
    """Bytes that are free on this rank's device; of a host's also those that it can swap out to."""
    own = has_own_memory(sharding.device)
    return free_bytes(sharding.device) + (0 if own else int(psutil.swap_memory().free))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what another rank told of its own, says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@dataclass(frozen=True)
class Worker:
    """Who works in batches, as messages about memory have it.

    Attributes:
        name: With a capital letter.
        remedy: What to do where memory does not suffice for one sample.
    """

    name: str
    remedy: str


THE_STEP = Worker(
    "The safety step",
    "lower `data.max_length`, or run `safegene apply` on the saved fine-tune, where no training holds memory",
)
EXTRACTION = Worker(
    "The extraction",
    "lower `max_new_tokens`, leave out the longest prompts, or take a device with more memory",
)
NO_ROOM_TO_CHECK = (
    "The checks before the safety step ran out of memory, so it would too: take a device with more memory, or fewer and "
    "shorter samples."
)


def halving(
    batch_size: int,
    work: Callable[[int], Result],
    sharding: Sharding,
    worker: Worker = THE_STEP,
) -> Result:
    """`work(batch_size)`; where memory runs out, again from its start with half of it, down to 1.

    Collective as `work` is: what one rank meets in its own forward passes all ranks hear of, and
    all start again. Where forward passes are collective themselves a rank that fails in one leaves
    the others waiting, and the error goes on.

    Args:
        batch_size: To begin with.
        work: Does the work from its start.
        sharding: How the model is spread over ranks.
        worker: Whose work it is.

    Raises:
        MemoryShortageError: Memory ran out with one sample at a time.
    """
    while True:
        try:
            return work(batch_size)
        except Exception as error:
            together = sharding.world_size == 1 or getattr(error, "on_all_ranks", False)
            if not (is_out_of_memory(error) and together):
                raise
            if batch_size == 1:
                raise MemoryShortageError(
                    f"{worker.name} ran out of memory with one sample at a time: {worker.remedy}."
                ) from error
        batch_size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "%s ran out of memory: it starts again with batches of %d.", worker.name, batch_size
        )


@contextmanager
def naming_shortage(message: str) -> Iterator[None]:
    """Where memory runs out inside the block, or in a function that this decorates, that is a
    `MemoryShortageError`; `message` is what it says.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = MemoryShortageError(message)
        raise shortage from error


class BatchSize:
    """A batch size that a whole run keeps: one with which memory ran out is not tried again.

    Args:
        first: To begin with.
        sharding: How the model is spread over ranks.
        worker: Whose work it is.

    Attributes:
        now: What the next work begins with.
    """

    def __init__(self, first: int, sharding: Sharding, worker: Worker):
        self.now, self._sharding, self._worker = first, sharding, worker

    def put_through(self, work: Callable[[int], Result]) -> Result:
        """Collective: `work(now)`, as `halving` does it."""

        def remembered(batch_size: int) -> Result:
            self.now = batch_size
            return work(batch_size)

        return halving(self.now, remembered, self._sharding, self._worker)
