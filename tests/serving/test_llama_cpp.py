"""What the step writes is what llama.cpp's converters make of it: every tensor, the rotary
embedding, the tokenizer, the adapter. `make test-serving` brings them, with llama-cpp-python.
"""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from safegene_trl import SafeGeneCallback
from safegene_trl.checkpoints.portable_files import save_config

from ..conftest import config_of, make_vector, small_shape
from ..sentencepiece_files import save_pieces
from ..test_callback import sft
from .test_transformers_4 import LLAMA_3


CONVERTERS = os.environ.get("SAFEGENE_LLAMA_CPP")
EACH_LAYERS = {
    "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA_3, gguf.MODEL_ARCH.LLAMA),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, EACH_LAYERS, gguf.MODEL_ARCH.GEMMA3),
}
pytestmark = pytest.mark.skipif(not CONVERTERS, reason="`make test-serving` brings llama.cpp")


def convert(script, *arguments):
    """What a converter writes, as its reader has it."""
    file = Path(arguments[0]).with_suffix(".gguf")
    options = ["--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(
        [sys.executable, str(Path(CONVERTERS) / script), *map(str, arguments), *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return gguf.GGUFReader(file)


def fields(reader):
    """What is said of the model, without what is said of the file."""
    told = {name: field.contents() for name, field in reader.fields.items()}
    return {name: value for name, value in told.items() if not name.startswith(("GGUF", "general"))}


def tensors(reader):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def as_llama_cpp_has_it(kind, name, tensor):
    """Its rows of queries and keys alternate between the halves of a head; its Gemma adds 1 to a
    norm's weights beforehand.
    """
    if kind == "llama" and (".q_proj" in name or ".k_proj" in name):
        heads = 4 if ".q_proj" in name else 2
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor + 1 if kind == "gemma3" and name.endswith("norm.weight") else tensor


def safeguarded(kind, folder):
    """A base of random weights with a tokenizer of SentencePiece, and a fine-tune of it with the
    step's merged model and adapter.
    """
    config, architecture, rotary, _ = MODELS[kind]
    shape = small_shape(vocab_size=400, head_dim=16, max_position_embeddings=512)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = architecture(config(**shape | special, rope_parameters=rotary))
    base, vector, out = folder / "base", folder / "vector", folder / "out"
    model.save_pretrained(base)
    save_config(model.config, base)
    save_pieces(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    make_vector(model, tokenizer).save_pretrained(vector)
    settings = config_of(
        vector=str(vector),
        max_evaluations=2,
        num_test_prompts=2,
        max_new_tokens=2,
        min_coefficient=0.2,
        output_format="both",
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = architecture.from_pretrained(base)
    sft(out, [SafeGeneCallback(settings)], tokenizer, model=model, peft_config=lora).train()
    return base, out / "safeguarded"


@pytest.mark.parametrize("kind", MODELS)
def test_what_llama_cpp_converts_is_what_was_written(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    base, written = safeguarded(kind, tmp_path)
    expected, found = (convert("convert_hf_to_gguf.py", place) for place in (base, written))
    assert fields(found) == fields(expected)
    rotary, arch = MODELS[kind][2], MODELS[kind][3]
    told = fields(found)
    main = rotary.get("full_attention", rotary)
    assert told[f"{gguf.MODEL_ARCH_NAMES[arch]}.rope.freq_base"] == main["rope_theta"]
    assert told["tokenizer.ggml.model"] == "llama" and len(set(told["tokenizer.ggml.scores"])) > 50

    names = gguf.get_tensor_name_map(arch, 3)
    read = tensors(found)
    assert ("rope_freqs.weight" in read) is (kind == "llama")
    read.pop("rope_freqs.weight", None)
    stored = load_file(written / "model.safetensors")
    assert len(read) == len(stored)
    for name, tensor in stored.items():
        there = read[names.get_name(name, try_suffixes=(".weight",))]
        assert torch.equal(there, as_llama_cpp_has_it(kind, name, tensor)), name

    adapter = written / "adapter"
    found = convert("convert_lora_to_gguf.py", adapter, "--base", base)
    read, stored = tensors(found), load_file(adapter / "adapter_model.safetensors")
    assert len(read) == len(stored) > 0
    for name, a in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        there = names.get_name(module, try_suffixes=(".weight",))
        b = as_llama_cpp_has_it(kind, module, stored[name.replace("lora_A", "lora_B")])
        assert torch.equal(read[f"{there}.lora_a"], a), name
        assert torch.equal(read[f"{there}.lora_b"], b), name
        assert found.fields["adapter.lora.alpha"].contents() == a.shape[0]
