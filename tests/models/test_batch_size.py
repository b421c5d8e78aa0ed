"""Memory that runs out halves the batches; nothing that `auto_find_batch_size` reacts to gets out."""

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from safegene_trl.distributed.layouts import Sharding
from safegene_trl.errors import MemoryShortageError
from safegene_trl.models import batch_size, losses
from safegene_trl.models.batch_size import fitting, fitting_answers, halving, is_out_of_memory

from ..conftest import ALONE, make_model
from ..recalibration.test_search import calibration_set, helpful_deltas, run


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP out of memory."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:24])
def test_the_batch_is_halved_down_to_one(error):
    tried = []

    def work(size):
        tried.append(size)
        if size > 1:
            raise error
        return "done"

    assert halving(12, work, ALONE) == "done" and tried == [12, 6, 3, 1]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:24])
def test_what_does_not_fit_at_all_is_an_error_of_ours(error):
    def work(size):
        raise error

    with pytest.raises(MemoryShortageError, match="one sample at a time") as caught:
        halving(4, work, ALONE)
    assert not should_reduce_batch_size(caught.value) and not isinstance(caught.value, RuntimeError)


def test_other_errors_go_on_at_once():
    tried = []

    def work(size):
        tried.append(size)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        halving(4, work, ALONE)
    assert tried == [4] and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("limit", [3, 1])
def test_the_search_starts_again_with_smaller_batches(limit, monkeypatch):
    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    expected = run(make_model(), deltas, data, batch_size=limit)
    original, seen = losses._forward, []

    def small(model, batch):
        seen.append(len(batch.input_ids))
        if len(batch.input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, batch)

    monkeypatch.setattr(losses, "_forward", small)
    model = make_model()
    found = run(model, deltas, data, batch_size=12 if limit == 3 else 8)
    assert found == expected and max(seen) > limit
    assert not any(module._forward_hooks for module in model.modules())


def test_memory_that_runs_out_in_the_backward_pass_counts_too(monkeypatch):
    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    expected = run(make_model(), deltas, data, batch_size=4)
    original = torch.autograd.grad

    def grad(outputs, inputs, *args, **kwargs):
        if getattr(inputs, "ndim", 0) == 2 and len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert run(make_model(), deltas, data, batch_size=8) == expected


class OnGpu(Sharding):
    """Whole weights, on a device that only says it is a GPU."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.device = torch.device("cuda")


def test_a_gpu_takes_what_its_memory_is_for(monkeypatch):
    model, free = make_model(), 2**30
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: free)
    sizes = []
    for shift in (0, 8, 9, 30):
        free = 2**30 >> shift
        sizes.append(fitting(None, model, 100, 50, OnGpu()))
    assert sizes[0] == 64 and 64 > sizes[1] > sizes[2] >= 1 and sizes[3] == 1
    free = 2**30
    assert fitting_answers(None, model, 100, 50, OnGpu()) == 128
    assert fitting(5, model, 100, 50, OnGpu()) == fitting_answers(5, model, 100, 50, OnGpu()) == 5
    assert fitting(None, model, 100, 50, ALONE) == fitting_answers(None, model, 100, 50, ALONE) == 8
