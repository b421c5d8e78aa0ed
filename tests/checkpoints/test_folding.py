"""A LoRA that is folded into the weights for good."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from safegene_trl.checkpoints import folding
from safegene_trl.checkpoints.folding import fold_adapters
from safegene_trl.distributed.layouts import Sharding

from ..conftest import ALONE, make_model, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def calls_of_adapters(model):
    """Names of the LoRA factors that a pass goes through."""
    seen = []
    for name, module in model.named_modules():
        if ".lora_A." in name:
            module.register_forward_hook(lambda *given, name=name: seen.append(name))
    logits(model)
    return seen


@pytest.mark.parametrize("dora", [False, True])
def test_weights_hold_the_adapter_as_a_merged_checkpoint_does(dora, monkeypatch):
    model = with_lora(make_model(), use_dora=dora)
    before, merged = logits(model), []
    original = folding.merged_tensor
    monkeypatch.setattr(
        folding, "merged_tensor", lambda p, *rest: merged.append(p.name) or original(p, *rest)
    )
    assert calls_of_adapters(model)
    assert fold_adapters(model, ALONE)
    assert torch.allclose(logits(model), before, atol=1e-5) and not calls_of_adapters(model)
    # every weight once
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(merged) == len(set(merged)) == len(layers) > 0
    expected = with_lora(make_model(), use_dora=dora).merge_and_unload()
    assert torch.allclose(logits(expected), logits(model), atol=1e-5)


def test_weights_are_rounded_as_they_are_shipped():
    """The sum is cast once from float32, where PEFT itself adds in the weights' own type."""
    model = with_lora(make_model().to(torch.bfloat16))
    name = "base_model.model.model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * b @ a
    assert fold_adapters(model, ALONE)
    assert torch.equal(layer.base_layer.weight, exact.to(torch.bfloat16))


class Shared(Sharding):
    """As where weights are shared out."""

    collective_forward = True


@pytest.mark.parametrize("why", ["plain", "quantised", "shared out", "embeddings"])
def test_what_cannot_be_folded_stays_as_it_is(why):
    model, sharding = make_model(), ALONE
    if why == "embeddings":
        config = LoraConfig(
            r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = get_peft_model(model, config)
    elif why != "plain":
        model = with_lora(model)
    if why == "quantised":
        model.get_base_model().is_quantized = True
    if why == "shared out":
        sharding = Shared(torch.device("cpu"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    assert not fold_adapters(model, sharding)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
