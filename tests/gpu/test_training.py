"""A fine-tune with the safety step at its end, in every way in which a training is set up on one
GPU.
"""

from importlib.util import find_spec
from shutil import which

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl import SafeGeneCallback

from ..conftest import config_of, make_model, make_vector
from ..quantization import packed, quantised, same, wide_model
from ..test_callback import sft
from .conftest import check_report, check_shipped, check_weights


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("every_vector_helps")]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
QUICK = {"max_evaluations": 3, "max_utility_loss": 100.0, "max_new_tokens": 4}
FEW = {"num_test_prompts": 4, "num_safety_shots": 8, "num_task_shots": 8, "num_benign_shots": 4}


def recomputed(reentrant):
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


def fine_tuned(device, folder, vectors, tokenizer, dtype, lora=True, model=None, **arguments):
    """A short training with the callback, in `folder`; everything that was asked for is checked."""
    place, vector = vectors
    callback = SafeGeneCallback(config_of(vector=str(place), **QUICK, **FEW))
    trainer = sft(
        folder,
        [callback],
        tokenizer,
        model=make_model().to(dtype) if model is None else model,
        peft_config=LoraConfig(**LORA, init_lora_weights=False) if lora else None,
        use_cpu=device.type == "cpu",
        **arguments,
    )
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device.type
    check_report(callback.report)
    check_shipped(callback.report, dtype)
    check_weights(trainer, callback.report, vector, folder / "safeguarded", dtype)
    assert trainer.train().training_loss > 0  # and it trains on
    return callback.report


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_of_a_type(dtype, lora, device, vectors, tokenizer, tmp_path):
    mixed = dtype == torch.bfloat16
    fine_tuned(device, tmp_path, vectors, tokenizer, dtype, lora, bf16=mixed)


def test_float32_weights_in_bfloat16_passes(device, vectors, tokenizer, tmp_path):
    fine_tuned(device, tmp_path, vectors, tokenizer, torch.float32, lora=False, bf16=True)


def test_float16(device, vectors, tokenizer, tmp_path):
    """With a gradient scaler, which exists on a GPU only."""
    mixed = device.type == "cuda"
    fine_tuned(device, tmp_path, vectors, tokenizer, torch.float16, fp16=mixed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention(attention, device, vectors, tokenizer, tmp_path):
    model = make_model().to(torch.bfloat16)
    model.set_attn_implementation(attention)
    fine_tuned(device, tmp_path, vectors, tokenizer, torch.bfloat16, model=model, bf16=True)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing(reentrant, device, vectors, tokenizer, tmp_path):
    arguments = {"bf16": True} | recomputed(reentrant)
    report = fine_tuned(device, tmp_path, vectors, tokenizer, torch.bfloat16, **arguments)
    # where there is memory for it, nothing is recomputed
    kept = "kept" if device.type == "cuda" else "recomputed"
    assert report["search"]["activations"] == kept


def test_compiled(device, vectors, tokenizer, tmp_path):
    if device.type == "cuda" and not (which("gcc") or which("cc")):
        pytest.skip("Compiled kernels need a C compiler.")
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "eager"
    arguments = {"torch_compile": True, "torch_compile_backend": backend}
    try:
        fine_tuned(device, tmp_path, vectors, tokenizer, torch.float32, **arguments)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits, device, tokenizer, tmp_path):
    """QLoRA: found on the quantised base, merged into the 16-bit one, every tensor compared."""
    base, place = tmp_path / "base", tmp_path / "vector"
    wide_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    make_vector(wide_model(), tokenizer, std=0.1).save_pretrained(place)
    callback = SafeGeneCallback(config_of(vector=str(place), **QUICK, **FEW))
    trainer = sft(
        tmp_path / "out",
        [callback],
        tokenizer,
        model=quantised(base, bits, device_map={"": str(device)}),
        peft_config=LoraConfig(**LORA),
        use_cpu=device.type == "cpu",
        bf16=True,
    )
    before = packed(trainer.model)
    trainer.train()
    check_report(callback.report)
    assert callback.report["shipped"]["base"] and callback.report["shipped"]["exact_tensors"]
    assert same(before, packed(trainer.model))
    written = load_file(tmp_path / "out" / "safeguarded" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert trainer.train().training_loss > 0


def test_liger_kernels(device, vectors, tokenizer, tmp_path):
    if device.type == "cpu" or find_spec("liger_kernel") is None:
        pytest.skip("Liger kernels need a GPU and the package `liger-kernel`.")
    arguments = {"bf16": True, "use_liger_kernel": True}
    fine_tuned(device, tmp_path, vectors, tokenizer, torch.bfloat16, **arguments)


def test_a_model_with_a_device_map(device, vectors, tokenizer, model_dir, tmp_path):
    everything = {"": 0 if device.type == "cuda" else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, device_map=everything, dtype=torch.bfloat16
    )
    folder = tmp_path / "out"
    fine_tuned(device, folder, vectors, tokenizer, torch.bfloat16, model=model, bf16=True)


def test_memory_of_a_gpu_decides_how_passes_are_made(device, vectors, tokenizer, tmp_path):
    """One batch for all where a GPU has room, factors that stay, and peaks of its allocator."""
    report = fine_tuned(device, tmp_path, vectors, tokenizer, torch.float32)
    assert report["search"]["factors"]["place"] == "resident"
    assert report["search"]["batch_size"] == (64 if device.type == "cuda" else 8)
    peaks = [phase["peak_memory_mib"] for phase in report["phases"].values()]
    assert all(peaks) and (device.type == "cpu" or max(peaks) < 400)
