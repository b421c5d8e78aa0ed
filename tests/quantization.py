"""Tiny models that bitsandbytes holds in 4 or 8 bits, on a CPU."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from safegene_trl.models import quantized
from safegene_trl.models.quantized import is_quantized

from .conftest import small_shape


BITS = {
    4: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


def wide_model(seed=0, **changes):
    """A tiny Llama in bfloat16 whose sizes bitsandbytes takes: multiples of 64."""
    torch.manual_seed(seed)
    shape = small_shape(hidden_size=64, intermediate_size=128, head_dim=16)
    model = LlamaForCausalLM(LlamaConfig(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
        for number, layer in enumerate(model.model.layers):  # norms tell one model from another
            layer.input_layernorm.weight += 0.1 * number + 0.05 * seed
    model.generation_config.eos_token_id = 1
    return model.to(torch.bfloat16).eval()


def quantised(folder, bits, **options):
    """The model of a folder, loaded in 4 or 8 bits; as its files are where that is None."""
    options = {"dtype": torch.bfloat16} | options
    if bits is not None:
        options["quantization_config"] = BITS[bits]
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def packed(model):
    """Every bit of the quantised layers: numbers, scales, and what else their state has."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            values = dict(module.state_dict())
            if state := getattr(module.weight, "quant_state", None):
                values |= {f"state.{key}": value for key, value in state.as_dict().items()}
            found |= {
                f"{name}.{key}": value.clone() if torch.is_tensor(value) else value
                for key, value in values.items()
            }
    return found


def same(here, there):
    """Whether two results of `packed` are the same, bit by bit."""
    return here.keys() == there.keys() and all(
        torch.equal(value, there[key]) if torch.is_tensor(value) else value == there[key]
        for key, value in here.items()
    )


@torch.no_grad()
def dequantized(layer) -> torch.Tensor:
    """The weight that a quantised layer stands for: d_out×d_in, float32, on the CPU. The layer is
    only read, in the form in which it was loaded.
    """
    quantized._as_loaded(layer)
    weight = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).float().cpu()
    if weight.is_floating_point():  # 8-bit layers may keep their weights, and quantise each pass
        return weight.detach().float().cpu()
    # the first pass moves the rows' largest numbers from the weight to the layer
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return (weight.data.float() * (scales.float() / 127)[:, None]).cpu()
