"""The safety step on a fine-tune whose base bitsandbytes holds in 4 or 8 bits."""

import json

import pytest
import torch
from jsonschema import validate
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from safegene_trl import SafeGeneCallback
from safegene_trl.models.quantized import is_quantized
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import config_of, make_vector, small_shape
from ..test_callback import sft


IDS = torch.arange(24).reshape(2, 12) + 5
BITS = {
    4: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    8: BitsAndBytesConfig(load_in_8bit=True),
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def wide_model(seed=0, **changes):
    """A tiny Llama whose sizes bitsandbytes takes: multiples of 64."""
    torch.manual_seed(seed)
    shape = small_shape(hidden_size=64, intermediate_size=128, head_dim=16, **changes)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    for number, layer in enumerate(model.model.layers):  # norms that tell one model from another
        layer.input_layernorm.weight.data += 0.1 * number + 0.01 * seed
    model.generation_config.eos_token_id = 1
    return model.to(torch.bfloat16).eval()


@pytest.fixture
def base_dir(tmp_path, tokenizer):
    wide_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def vector_of_base(tmp_path, tokenizer):
    make_vector(wide_model(), tokenizer, std=0.1).save_pretrained(tmp_path / "vector")
    return tmp_path / "vector"


@pytest.fixture
def config(vector_of_base):
    """Accepts whatever a random vector does to a random model."""

    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 3,
            "min_coefficient": 0.2,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
        }
        return config_of(**{"vector": str(vector_of_base)} | quick | values)

    return make


def quantised(folder, bits, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BITS[bits], dtype=torch.bfloat16, **options
    )


def packed(model):
    """Every bit of the quantised layers: numbers, scales, and what else their state has."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            found |= {
                f"{name}.{key}": value.clone() if torch.is_tensor(value) else value
                for key, value in module.state_dict().items()
            }
    return found


def same(here, there):
    return here.keys() == there.keys() and all(
        torch.equal(here[key], there[key])
        if torch.is_tensor(here[key])
        else here[key] == there[key]
        for key in here
    )


def expected(base, adapter, report, vector_dir):
    """By name, each tensor of the base with the saved LoRA and λ·V added in float32."""
    tensors = load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    scale = json.loads((adapter / "adapter_config.json").read_text())
    vector = SafetyVector.from_pretrained(vector_dir)
    by_module = vector.space("module").by_module(report["coefficients"])
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        total = tensor.float()
        prefix = f"base_model.model.{module}"
        if f"{prefix}.weight" in lora:  # saved whole
            total = lora[f"{prefix}.weight"].float()
        if f"{prefix}.lora_A.weight" in lora:
            product = (
                lora[f"{prefix}.lora_B.weight"].float() @ lora[f"{prefix}.lora_A.weight"].float()
            )
            total = total + product * scale["lora_alpha"] / scale["r"]
        if module in vector.deltas:
            delta = vector.deltas[module]
            total = total + delta.b @ (by_module[module][:, None] * delta.a)
        tensors[name] = total
    return tensors


@pytest.mark.parametrize("bits", [4, 8])
def test_a_fine_tune_is_merged_into_its_16_bit_base(
    bits, base_dir, config, vector_of_base, tokenizer, tmp_path
):
    callback = SafeGeneCallback(config(granularity="module"))
    trainer = sft(
        tmp_path / "out",
        [callback],
        tokenizer,
        model=quantised(base_dir, bits),
        peft_config=LoraConfig(**LORA),
    )
    before = packed(trainer.model)
    trainer.train()
    assert same(before, packed(trainer.model))
    report, folder = callback.report, tmp_path / "out/safeguarded"
    validate(json.loads((folder / "safegene_report.json").read_text()), SCHEMA)
    assert any(report["coefficients"].values())
    side = report["shipped"]["base"]
    assert side["recalibrated_on"].startswith(f"{bits}-bit base (bitsandbytes")
    assert side["written"] == f"merged into the bfloat16 base {base_dir}"
    assert "is not measured itself" in report["warnings"][-1]
    assert side["written"] in (folder / "README.md").read_text().replace("\\", "")
    assert report["fine_tune"] == str(tmp_path / "out")
    written = load_file(folder / "model.safetensors")
    wanted = expected(base_dir, tmp_path / "out", report, vector_of_base)
    assert written.keys() == wanted.keys()
    assert report["shipped"]["exact_tensors"] == len(written)
    for name, tensor in wanted.items():
        assert written[name].dtype == torch.bfloat16
        torch.testing.assert_close(written[name].float(), tensor, rtol=2**-7, atol=1e-6)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    trainer.train()  # the live model can be trained on
