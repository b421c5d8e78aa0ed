"""What a training holds by its shapes, against what its tensors do hold."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safegene_trl.estimation.cost import Launch
from safegene_trl.estimation.probe import _Allocations
from safegene_trl.estimation.training import AROUND, ModelSizes, training_bytes

from ..conftest import with_lora


SHAPE = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 1024, "num_hidden_layers": 4}


def llama(**changes):
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE | changes, num_attention_heads=4, num_key_value_heads=2)
    )


def held_by_a_step(model, mixed: bool) -> int:
    """Bytes that tensors made by one step of a LoRA training hold at its peak, with 4 samples of 128
    tokens.
    """
    tuned = with_lora(model, rank=2).train()
    ids = torch.randint(0, model.config.vocab_size, (4, 128))
    with _Allocations() as allocations, torch.autocast("cpu", torch.bfloat16, mixed):
        tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return allocations.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 96}, {"num_hidden_layers": 1}])
def test_a_step_holds_about_what_is_told(changes, dtype):
    torch.manual_seed(0)
    model = llama(**changes).to(dtype)
    sizes = ModelSizes.of(model)
    beside = AROUND + sizes.weights(dtype.itemsize) + 16 * 2 * sizes.factors
    told = training_bytes(sizes, 2, 512, dtype.itemsize, checkpointing=False) - beside
    ratio = told / held_by_a_step(model, dtype == torch.bfloat16)
    assert 0.9 < ratio < 1.5, ratio


def test_layers_that_are_recomputed_hold_about_what_is_told():
    torch.manual_seed(0)
    model = llama(num_hidden_layers=12).bfloat16()
    # transformers 5.24 renamed it
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    sizes = ModelSizes.of(model)
    beside = AROUND + sizes.weights(2) + 16 * 2 * sizes.factors
    ratio = (training_bytes(sizes, 2, 512, 2) - beside) / held_by_a_step(model, True)
    assert 0.9 < ratio < 1.5, ratio


def test_sizes_are_those_of_the_model():
    sizes = ModelSizes.of(llama())
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192
    assert sizes.in_layers == 4 * layer
    assert sizes.parameters == 4 * (layer + 128) + 2 * 1024 * 64 + 64
    assert sizes.width == 2 * 128 + 2 * 96 + 3 * 256 and sizes.factors == 4 * sizes.width
    assert ModelSizes.of(llama(), ["q_proj"]).factors == 4 * 128
    tied = ModelSizes.of(llama(tie_word_embeddings=True))
    assert tied.parameters == sizes.parameters - 1024 * 64 and tied.in_layers == sizes.in_layers


def test_shards_and_four_bits_hold_less():
    sizes = ModelSizes(10**10, 9 * 10**9, 10**6, 32, 4096, 80_000, 128_000)
    whole = training_bytes(sizes, 16, 2048, 2)
    shared = training_bytes(sizes, 16, 2048, 2, Launch(8, True))
    assert whole - shared == 2 * 10**10 - (2 * 10**10 // 8 + 2 * 10**9) + 14 * 16 * 10**6
    assert training_bytes(sizes, 16, 2048, 2, Launch(8)) == whole
    four = training_bytes(sizes, 16, 2048, 2, four_bit=True)
    assert whole - four == 2 * 10**10 - int(0.52 * 9 * 10**9) - 4 * 10**9
    assert training_bytes(sizes, 16, 2048, 2, checkpointing=False) > whole
