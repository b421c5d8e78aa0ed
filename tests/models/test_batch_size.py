"""Memory that runs out halves the batches; nothing that `auto_find_batch_size` reacts to gets out."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from safegene_trl.distributed.layouts import Sharding
from safegene_trl.errors import ConfigError, MemoryShortageError
from safegene_trl.models import batch_size, losses
from safegene_trl.models.batch_size import (
    THE_STEP,
    BatchSize,
    check_room,
    fitting,
    fitting_answers,
    halving,
    is_out_of_memory,
    naming_shortage,
)
from safegene_trl.models.inputs import Sample

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


def sample(tokens, responses):
    return Sample([7] * tokens, [False] * (tokens - responses) + [True] * responses)


# of make_model, from layer 1 on, in float32
PER_TOKEN, PER_ANSWER = 4 * 2 * 32, 4 * 2 * 320
LEAST = 100 * PER_TOKEN + 50 * PER_ANSWER


@pytest.mark.parametrize(("device", "wanted"), [("cuda", None), ("cuda", 2), ("cpu", None)])
@pytest.mark.parametrize("spare", [0, -1])
def test_a_sample_that_cannot_fit_is_named_with_the_bytes_that_are_missing(
    device, wanted, spare, monkeypatch
):
    samples, sharding = [sample(20, 5), sample(100, 50)], OnGpu() if device == "cuda" else ALONE
    assert LEAST == 153600  # and the shape of the tiny model is still what is reckoned with
    swap = 0 if device == "cuda" else 1000
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: LEAST + spare - swap)
    monkeypatch.setattr(batch_size.psutil, "swap_memory", lambda: SimpleNamespace(free=1000))
    if spare == 0:
        check_room(None, make_model(), samples, 1, sharding)
        check_room(1, make_model(), samples, 1, sharding)
        check_room(None, make_model(), samples[:1], 1, sharding)
        return
    with pytest.raises(
        MemoryShortageError, match=r"needs for its longest sample at least 153,600 bytes"
    ) as caught:
        check_room(wanted, make_model(), samples, 1, sharding)
    said = str(caught.value)
    assert "153,599 are free now" in said and ": 1 bytes are missing" in said
    # with which it would fit, whatever part of a sample is the answer
    assert "set `data.max_length: 54`" in said and 54 * (PER_TOKEN + PER_ANSWER) < LEAST
    assert not any(words in said for words in batch_size._WORDS)
    # the layers below the vector keep nothing
    check_room(None, make_model(), samples, 2, sharding)


def test_a_device_for_no_sample_at_all_names_no_length(monkeypatch):
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryShortageError, match=r"so take a device with more memory\.$"):
        check_room(None, make_model(), [sample(100, 50)], 1, OnGpu())


def test_batches_of_ones_own_that_cannot_fit_name_the_size_that_does(monkeypatch):
    samples = [sample(20, 5)] * 3 + [sample(100, 50)] * 3
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2 * LEAST + 100)
    check_room(2, make_model(), samples, 1, OnGpu())
    with pytest.raises(ConfigError, match=r"`batch_size: 3` at least 460,800 bytes") as caught:
        check_room(3, make_model(), samples, 1, OnGpu())
    assert "153,500 bytes are missing, so set `batch_size: 2`, or leave it out" in str(caught.value)
    # more than there are samples
    with pytest.raises(ConfigError, match="set `batch_size: 2`"):
        check_room(1000, make_model(), samples, 1, OnGpu())
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**30)
    check_room(1000, make_model(), samples, 1, OnGpu())


def test_a_model_on_several_devices_is_not_judged_by_one(monkeypatch):
    model = make_model()
    model.lm_head.to("meta")
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 0)
    check_room(None, model, [sample(100, 50)], 1, OnGpu())


def test_shortage_is_named_and_nothing_else_is():
    @naming_shortage("The device is too small: take another one.")
    def work(error):
        raise error

    for error in ERRORS:
        with pytest.raises(MemoryShortageError, match="device is too small") as caught:
            work(error)
        assert caught.value.__cause__ is error and not should_reduce_batch_size(caught.value)
    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError())
    with pytest.raises(ConfigError, match="out of memory"):
        work(ConfigError("out of memory"))


def test_a_size_is_remembered():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise MemoryError
        return size

    size = BatchSize(12, ALONE, THE_STEP)
    assert [size.put_through(work) for _ in range(2)] == [3, 3]
    assert tried == [12, 6, 3, 3] and size.now == 3
