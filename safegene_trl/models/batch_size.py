"""Running out of memory: the same work again in smaller batches, on every rank."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import MemoryShortageError
from ..sharding import Sharding


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what another rank told of its own, says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def halving(batch_size: int, work: Callable[[int], Result], sharding: Sharding) -> Result:
    """`work(batch_size)`; where memory runs out, again from its start with half of it, down to 1.

    Collective as `work` is: what one rank meets in its own forward passes all ranks hear of, and all start again. Where
    forward passes are collective themselves a rank that fails in one leaves the others waiting, and the error goes on.

    Args:
        batch_size: To begin with.
        work: Does the work from its start.
        sharding: How the model is spread over ranks.

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
                    "The safety step ran out of memory with one sample at a time: lower `max_length`, or run `safegene "
                    "apply` on the saved fine-tune, where no training holds memory."
                ) from error
        batch_size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("The safety step ran out of memory: it starts again with batches of %d.", batch_size)
