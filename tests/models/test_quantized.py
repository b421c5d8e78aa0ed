"""Linear layers that bitsandbytes holds in 4 or 8 bits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from safegene_trl.models.attachment import frozen_for_calibration
from safegene_trl.models.parameters import (
    canonical_modules,
    canonical_parameters,
    is_transposed,
    linear_shape,
    unadapted,
)
from safegene_trl.models.quantized import (
    describe_quantized,
    is_quantized,
    kept_packed,
)
from safegene_trl.vectors.family import Family

from ..conftest import attachment_of, make_deltas, make_model
from ..quantization import BITS, dequantized, packed, quantised, same, wide_model


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def base_dir(tmp_path):
    wide_model().save_pretrained(tmp_path)
    return tmp_path


def gpt2(folder):
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **tokens)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantised_model_is_of_the_family_of_its_base(kind, bits, tmp_path, tokenizer):
    base = gpt2(tmp_path) if kind == "gpt2" else wide_model()
    base.save_pretrained(tmp_path)
    lora = LoraConfig(target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"])
    model = get_peft_model(quantised(tmp_path, bits), lora)
    before = packed(model)
    assert Family.of(model, tokenizer) == Family.of(base, tokenizer)
    there = {parameter.name: parameter for parameter in canonical_parameters(base)}
    here = {parameter.name: parameter for parameter in canonical_parameters(model)}
    assert {name: p.shape for name, p in here.items()} == {n: p.shape for n, p in there.items()}
    layers = {n: m for n, m in canonical_modules(model).items() if is_quantized(unadapted(m))}
    assert len(layers) == (7 * 3 if kind == "llama" else 4 * 2)

    def check_layers():
        for name, module in layers.items():
            plain = base.get_submodule(name)
            assert linear_shape(module) == linear_shape(plain)
            assert is_transposed(module) is is_transposed(plain)
            weight = plain.weight.T if is_transposed(plain) else plain.weight
            distance = (dequantized(unadapted(module)) - weight).norm() / weight.norm()
            assert distance < (0.12 if bits == 4 else 0.02)

    check_layers()
    assert same(before, packed(model))
    with torch.no_grad():
        model.eval()(IDS)  # in which 8-bit layers move their numbers, and a CPU lays out 4-bit ones
    check_layers()


def test_how_a_base_is_quantised_is_said(base_dir):
    assert describe_quantized(make_model()) is None
    assert describe_quantized(quantised(base_dir, 8)) == "8-bit base (bitsandbytes)"
    said = describe_quantized(quantised(base_dir, 4))
    assert said == "4-bit base (bitsandbytes, nf4, double quantisation)"
    plain = BitsAndBytesConfig(load_in_4bit=True)
    said = describe_quantized(quantised(base_dir, None, quantization_config=plain))
    assert said == "4-bit base (bitsandbytes, fp4)"


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, 1e-3),
        # as for FSDP: packed into numbers that look like weights
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, 0.15),
    ],
)
def test_a_weight_of_floating_point_numbers_may_be_packed(options, limit, base_dir):
    config = BitsAndBytesConfig(**options)
    model = quantised(base_dir, None, quantization_config=config)
    layer = model.model.layers[0].mlp.up_proj
    assert is_quantized(layer) and layer.weight.is_floating_point()
    plain = wide_model().model.layers[0].mlp.up_proj.weight.float()
    assert (dequantized(layer) - plain).norm() <= limit * plain.norm()
    assert linear_shape(layer) == (128, 64)


def graded(model, deltas):
    """Logits with the vector on, and what the coefficients' gradients of their sum are."""
    attachment = attachment_of(model, deltas, "module")
    values = torch.full((len(attachment.space.names),), 0.5, requires_grad=True)
    with frozen_for_calibration(model), attachment.applied(values):
        with torch.no_grad():
            plain = model(IDS).logits.float()
        logits = model(IDS).logits.float()
        weights = torch.linspace(-1, 1, logits.shape[-1])
        (gradient,) = torch.autograd.grad((logits * weights).sum(), values)
    return plain, logits.detach(), gradient


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_vector_beside_quantised_weights_is_one_beside_what_they_stand_for(
    bits, evaluated, base_dir
):
    exact = copy.deepcopy(BITS[bits])
    if bits == 4:
        exact.bnb_4bit_compute_dtype = torch.float32
    model = quantised(base_dir, None, quantization_config=exact, dtype=torch.float32)
    dense = wide_model().float()
    for name, module in model.named_modules():
        if is_quantized(module):
            dense.get_submodule(name).weight.data = dequantized(module)
    deltas = make_deltas(dense, std=0.1)
    if evaluated:  # as by the trainer, in the middle of the training
        with torch.no_grad():
            model.eval()(IDS)
    # activations are quantised as well in 8 bits; a CPU's own layout rounds 4 bits once more
    limit = 0.1 if bits == 8 or evaluated else 1e-3
    for here, there in zip(graded(model, deltas), graded(dense, deltas), strict=True):
        assert (here - there).norm() <= limit * there.norm()


def test_passes_leave_4_bit_weights_as_they_were_loaded(base_dir):
    model = quantised(base_dir, 4).eval()
    before = packed(model)
    layers = [module for module in model.modules() if is_quantized(module)]
    flags = [layer.support_avx512bf16_for_cpu for layer in layers]
    with pytest.raises(RuntimeError, match="stop"), kept_packed(model), torch.no_grad():
        model(IDS)
        raise RuntimeError("stop")
    assert same(before, packed(model))
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == flags
