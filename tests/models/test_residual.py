"""The residual stream: its layers, what writes to it, and what is added to it while a model runs."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from safegene_trl import SafeGeneError, steered
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.residual import bent_layers, decoder_layers, residual_writers

from ..architectures import CONFIGS, make_architecture
from ..conftest import ARCHITECTURES, make_model, with_lora


# a norm or a factor after what is written; layers whose experts write as well
BENT = {"glm4", "gemma2", "granitemoehybrid"}
MIXTURES = {
    *("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "lfm2_moe"),
    *("jamba", "nemotron_h", "qwen3_next", "dbrx"),
}


IDS = torch.tensor([[7, 30, 90, 200]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_direction_is_added_at_its_layer_and_nothing_stays(kind):
    model = make_model(kind)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    layers = decoder_layers(model)
    seen = []
    with torch.no_grad():
        before = model(IDS, output_hidden_states=True)
        hooks = [len(layer._forward_hooks) for layer in layers.values()]
        with steered(model, {1: direction}, alpha=0.5):
            watch = layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            during = model(IDS).logits
            watch.remove()
        after = model(IDS).logits
    expected = before.hidden_states[2] + 0.5 * direction
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert not torch.allclose(during, before.logits, atol=1e-3)
    assert torch.equal(after, before.logits)
    assert [len(layer._forward_hooks) for layer in layers.values()] == hooks


def test_what_is_generated_is_steered_and_hooks_go_where_it_fails(model, tokenizer):
    ask = [[{"role": "user", "content": "sort item 3"}]]
    unembedded = model.get_output_embeddings().weight[120].detach()
    plain = generate_answers(model, tokenizer, ask, 4, 1)
    with steered(model, {2: unembedded}, alpha=100):
        moved = generate_answers(model, tokenizer, ask, 4, 1)
    assert moved != plain and moved[0] == tokenizer.decode([120] * 4).strip()
    with pytest.raises(RuntimeError, match="mine"), steered(model, {2: unembedded}):
        raise RuntimeError("mine")
    assert generate_answers(model, tokenizer, ask, 4, 1) == plain


def test_a_model_with_adapters_in_16_bits_is_steered(model):
    adapted = with_lora(model).bfloat16()
    with torch.no_grad(), steered(adapted, {0: torch.ones(32)}, 2):
        assert adapted(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("directions", "alpha", "message"),
    [
        ({7: torch.ones(32)}, 1.0, "no layer 7: give directions for some of the layers 0 to 2"),
        ({1: torch.ones(31)}, 1.0, "layer 1 must be a tensor of 32 numbers"),
        ({1: torch.full((32,), float("nan"))}, 1.0, "layer 1 must be a tensor of 32 numbers"),
        ({1: torch.ones(32)}, -1.0, "never negative"),
        ({1: torch.ones(32)}, float("nan"), "never negative"),
        ({1: torch.ones(32)}, "1", "never negative"),
        ({1: torch.ones(32)}, 1e300, "finite times `alpha` too"),
        ({1: [1.0] * 32}, 1.0, "layer 1 must be a tensor"),
        ({1: np.ones(32)}, 1.0, "layer 1 must be a tensor"),
        ([torch.ones(32)], 1.0, "must be a mapping from a layer"),
    ],
)
def test_impossible_steering(model, directions, alpha, message):
    with pytest.raises(SafeGeneError, match=message), steered(model, directions, alpha):
        pass


@pytest.mark.parametrize("alpha", [np.int64(1), np.float32(0.5)])
def test_a_number_of_numpy_steers(model, alpha):
    with torch.no_grad():
        plain = model(IDS).logits
        with steered(model, {1: torch.ones(32)}, alpha):
            assert not torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *CONFIGS])
def test_layers_and_what_writes_are_known_of_every_architecture(kind):
    """Each layer has one that writes, and what it writes moves the stream after its layer."""
    model = make_model(kind) if kind in ARCHITECTURES else make_architecture(kind)
    layers, writers = decoder_layers(model), residual_writers(model)
    assert list(layers) == list(range(model.config.get_text_config().num_hidden_layers))
    assert not any(part in name for name in writers for part in ("q_proj", "gate", "router"))
    for name in writers:
        assert any(f".{index}." in name for index in layers)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *CONFIGS])
def test_where_the_stream_gets_something_else_than_what_is_written(kind):
    model = make_model(kind) if kind in ARCHITECTURES else make_architecture(kind)
    bent = bent_layers(model, torch.arange(5, 17)[None])
    layers = list(decoder_layers(model))
    if kind in BENT:
        assert bent == layers
    elif kind in MIXTURES:
        assert bent and set(bent) <= set(layers)  # the first layers of some are dense
    else:
        assert bent == []
    assert not any(module._forward_hooks for module in model.modules())


def test_rounding_to_16_bits_bends_nothing():
    model = make_model("llama").to(torch.bfloat16)
    assert bent_layers(model, torch.arange(5, 17)[None]) == []


def test_a_model_of_conv1d_layers():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    assert list(decoder_layers(model)) == [0, 1]
    assert {name.partition(".h.")[2][2:] for name in residual_writers(model)} == {
        "attn.c_proj",
        "mlp.c_proj",
    }


def test_what_has_no_layers_is_refused():
    class Bare(torch.nn.Module):
        pass

    with pytest.raises(SafeGeneError, match="No layers are known of Bare"):
        decoder_layers(Bare())
