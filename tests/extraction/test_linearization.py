"""Linearised blocks: against finite differences, nothing over single linear layers, gradients, and
what is put back.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safegene_trl.errors import ConfigError, UnsupportedModelError
from safegene_trl.extraction.delta import adapter_delta
from safegene_trl.extraction.distillation import (
    DistillationSettings,
    distilled,
    expansion,
    reference_batches,
)
from safegene_trl.extraction.linearization import blocks_of, linearized
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import canonical_modules

from ..conftest import ALONE, make_model, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def model():
    model = with_lora(make_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    return model.eval()


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_value_and_slope_by_finite_differences(model, kind):
    """The block alone, on an input of its own, in float64: f(0) + (f(h) − f(−h)) / 2h, with h the
    scale of the LoRA.
    """
    model.double()
    model.get_base_model().set_attn_implementation("eager")  # before the mask is made
    (block, *_) = blocks_of(model, kind, "default")
    taken = {}
    hook = block.register_forward_hook(
        lambda module, args, kwargs, output: taken.update(args=args, kwargs=kwargs),
        with_kwargs=True,
    )
    model(IDS, use_cache=False)
    hook.remove()

    def output(scale):
        layers = [module for module in block.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer.scaling["default"] = scale * 2.0
        found = block(*taken["args"], **taken["kwargs"])
        for layer in layers:
            layer.scaling["default"] = 2.0
        return found[0] if isinstance(found, tuple) else found

    h = 1e-3  # the softmax of the attention is float32
    expected = output(0.0) + (output(h) - output(-h)) / (2 * h)
    assert (output(1.0) - expected).abs().max() > 1e-3, "the block must not be linear by itself"
    with linearized(model, [block], "default"):
        found = block(*taken["args"], **taken["kwargs"])
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=2e-5)


def test_single_linear_layers_are_linear_already(model):
    plain = model(IDS).logits
    singles = [
        module for name, module in canonical_modules(model).items() if name.endswith("_proj")
    ]
    assert len(singles) == 21
    with linearized(model, singles, "default"):
        assert torch.allclose(model(IDS).logits, plain, atol=2e-6)
    for kind in ("mlp", "attention", "both"):
        with linearized(model, blocks_of(model, kind, "default"), "default"):
            assert (model(IDS).logits - plain).abs().max() > 1e-3


def test_gradients_reach_every_factor_and_everything_is_put_back(model):
    plain = model(IDS).logits
    model.get_base_model().set_attn_implementation("sdpa")
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    with linearized(model, blocks_of(model, "both", "default"), "default"):
        model(IDS).logits.square().mean().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert torch.allclose(model(IDS).logits, plain, atol=1e-6)
    with (
        pytest.raises(ZeroDivisionError),
        linearized(model, blocks_of(model, "both", "default"), "default"),
    ):
        raise ZeroDivisionError
    assert torch.allclose(model(IDS).logits, plain, atol=1e-6)


def test_blocks(model):
    assert len(blocks_of(model, "both", "default")) == 6
    assert [type(block).__name__ for block in blocks_of(model, "mlp", "default")] == [
        "LlamaMLP"
    ] * 3
    queries = get_peft_model(
        make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert len(blocks_of(queries, "both", "default")) == 3
    with pytest.raises(UnsupportedModelError, match="no blocks of the kind `mlp`"):
        blocks_of(queries, "mlp", "default")


def test_distilled_on_linear_blocks(tokenizer):
    """Learns through the expansion too, and to other factors than without it."""
    from .test_distillation import BENIGN, HARMFUL, samples

    def run(blocks):
        aligned, degraded = make_model(), with_lora(make_model(), rank=4)
        start = {
            name: LowRankDelta(t.delta.a, 0 * t.delta.b)
            for name, t in adapter_delta(aligned, degraded).items()
        }
        refusals, answers = (
            samples(tokenizer, HARMFUL, "sorry i cannot help"),
            samples(tokenizer, BENIGN, "stir"),
        )
        data = reference_batches(aligned, refusals, 6, 0, False, ALONE)
        data += reference_batches(degraded, answers, 8, 0, True, ALONE)
        settings = DistillationSettings(20, 1e-2, 1.0, linearized_blocks=blocks)
        return distilled(lambda: degraded, start, data, settings, False)

    (linear, losses), (plain, _) = run("both"), run(None)
    assert losses["after"]["harmful"] < losses["before"]["harmful"]
    assert max(float((linear[name].b - plain[name].b).abs().max()) for name in plain) > 1e-4


def test_weights_that_zero3_shares_out_are_refused(model):
    """As DeepSpeed marks them; `tests/distributed` has the launch."""
    next(model.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="launch with `ddp`"):
        expansion(model, "mlp")
    expansion(model, None)
