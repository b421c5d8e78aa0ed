"""Factors that are trained beside a frozen model: where they are, what they add, who gets a gradient."""

import pytest
import torch

from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.trained_deltas import TrainedDeltas, plain_modules

from ..conftest import make_deltas, make_model


IDS = torch.arange(24).reshape(2, 12) + 5


def made(model, deltas, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TrainedDeltas(model, deltas, 4, generator, torch.device("cpu"))


def test_at_first_nothing_is_added_and_the_seed_decides():
    model, deltas = make_model(), make_deltas(make_model())
    trained = made(model, deltas)
    with torch.no_grad():
        plain = model(IDS).logits
        with trained.applied():
            assert torch.equal(model(IDS).logits, plain)
    for a, b in zip(trained.parameters[::2], trained.parameters[1::2], strict=True):
        assert a.dtype == torch.float32 and not b.any()
        assert 0.8 / a.shape[1] ** 0.5 < float(a.abs().max()) <= 1 / a.shape[1] ** 0.5
    assert torch.equal(trained.values, made(model, deltas).values)
    assert not torch.equal(trained.values, made(model, deltas, seed=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_add_their_product_and_alone_get_gradients(dtype):
    model, deltas = make_model().to(dtype).requires_grad_(False), make_deltas(make_model())
    trained = made(model, deltas)
    numbers = trained.values + 0.05 * torch.randn(
        trained.values.shape, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        for each, own in zip(trained.parameters, trained.shaped(numbers), strict=True):
            each.copy_(own)
    with trained.applied():
        found = model(IDS).logits
        gradients = torch.autograd.grad(found.float().logsumexp(-1).sum(), trained.parameters)
    assert all(each.dtype == torch.float32 and bool(each.any()) for each in gradients)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        for name, delta in trained.deltas(numbers).items():
            model.get_submodule(name).weight += delta.dense().to(dtype)
        expected = model(IDS).logits
    apart = float((found - expected).abs().max()) / float(expected.abs().max())
    assert apart < (1e-5 if dtype == torch.float32 else 0.05)


def test_experts_that_lie_in_one_parameter_get_none():
    model, deltas = make_model(), make_deltas(make_model())
    expert = "model.layers.1.mlp.experts.down_proj[3]"
    more = deltas | {expert: LowRankDelta(torch.zeros(2, 8), torch.zeros(8, 2))}
    assert plain_modules(more) == list(deltas)
    assert torch.equal(made(model, more).values, made(model, deltas).values)
