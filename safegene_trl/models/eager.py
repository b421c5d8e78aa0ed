"""Compiled models run as they were written: a compiled graph knows nothing of hooks that came after
it.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from .parameters import base_model


@contextmanager
def running_eagerly(model: nn.Module) -> Iterator[None]:
    """While open, what `torch.compile` and `Module.compile` made of the model or its parts runs
    eagerly.

    Afterwards, in every case, it is compiled as before; nothing is compiled again for that.
    """
    with ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            for module in model.modules():
                _set_aside(module, undo)
            undo.enter_context(_stance(model))
        yield


def _set_aside(module: nn.Module, undo: ExitStack) -> None:
    own = module.__dict__
    compiled_call, forward = own.get("_compiled_call_impl"), own.get("forward")
    if compiled_call is not None:  # `module.compile()`
        own["_compiled_call_impl"] = None
        undo.callback(partial(own.__setitem__, "_compiled_call_impl", compiled_call))
    plain = None if forward is None else torch._dynamo.eval_frame.innermost_fn(forward)
    # `torch.compile(module)`, `module.forward = torch.compile(module.forward)`
    if plain is not forward:
        own["forward"] = plain
        undo.callback(partial(own.__setitem__, "forward", forward))


def _stance(model: nn.Module) -> AbstractContextManager[Any]:
    """Reaches what is compiled inside some other wrapper; flex attention is a compiled kernel by
    design.
    """
    if (
        getattr(getattr(base_model(model), "config", None), "_attn_implementation", None)
        == "flex_attention"
    ):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
