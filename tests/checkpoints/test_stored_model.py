"""Which finished models are not opened."""

import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.loading import load_model
from safegene_trl.checkpoints.merge_terms import NO_VECTOR
from safegene_trl.checkpoints.stored_merge import write_merged
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import UnsupportedModelError

from ..architectures import make_architecture
from ..conftest import make_model, with_lora
from .test_stored_merge import saved


def test_quantised_checkpoint_is_refused(tokenizer, tmp_path):
    source = saved(make_model(), tokenizer, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="16-bit"):
        StoredModel.open(str(source))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_changed_its_base_is_refused(start, tokenizer, tmp_path):
    base = saved(make_model(), tokenizer, tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start
    )
    adapted = get_peft_model(make_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match=start):
        StoredModel.open(str(tmp_path / "adapter"))


@torch.no_grad()
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_changed_its_base_is_loaded_as_it_was_trained(start, tokenizer, tmp_path):
    base = saved(make_model(), tokenizer, tmp_path / "base")
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
    adapted = get_peft_model(make_model(), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.add_(0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, ids = load_model(str(tmp_path / "adapter")), torch.arange(12)[None] + 5
    expected = adapted.eval()(ids).logits
    assert (make_model()(ids).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)


ROUTER = {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
BOTH = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
UNMERGEABLE = {  # an adapter, and what is said of it
    "one of a tied pair": (
        lambda: with_lora(make_model(), target_modules=["lm_head"]),
        "LoRA on `lm_head`.*shares",
    ),
    "both of a tied pair": (
        lambda: with_lora(make_model(), **BOTH),
        "LoRA on `(lm_head|model.embed_tokens)`.*shares",
    ),
    "a router": (
        lambda: with_lora(make_architecture("mixtral"), **ROUTER),
        r"LoRA on the parameter `model\.layers\.0\.mlp\.gate\.weight`",
    ),
    "LoRA bias": (lambda: with_lora(make_model(), lora_bias=True, bias="none"), "lora_bias"),
    "IA3": (
        lambda: get_peft_model(
            make_model(),
            IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        ),
        "uses PEFT's IA3.*only LoRA can be merged",
    ),
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_adapters_that_cannot_be_merged_are_refused_by_name(kind, tokenizer, tmp_path):
    make, message = UNMERGEABLE[kind]
    plain = make_architecture("mixtral") if kind == "a router" else make_model()
    base, adapted = saved(plain, tokenizer, tmp_path / "base"), make()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match=message):
        StoredModel.open(str(tmp_path / "adapter"))


def unfrozen(model):
    model.get_base_model().model.norm.requires_grad_(True).weight.data.add_(1.0)


def merged(model):
    model.merge_adapter()


def beside_another(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("act", [unfrozen, merged, beside_another])
def test_a_folder_holds_one_lora_and_nothing_else(act, tokenizer, tmp_path):
    """What PEFT puts elsewhere or does not save is not merged from it."""
    base = saved(make_model(), tokenizer, tmp_path / "base")
    adapted = with_lora(make_model())
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    act(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    write_merged(
        StoredModel.open(str(tmp_path / "adapter")),
        NO_VECTOR,
        CheckpointFolder(tmp_path / "out", tokenizer, "5GB"),
        show_progress=False,
    )
    expected = with_lora(make_model()).merge_and_unload().state_dict()
    loaded = load_model(str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(loaded[name], expected[name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig, AdaLoraConfig])
def test_other_methods_than_lora_are_refused_by_the_name_in_their_files(kind, model_dir, tmp_path):
    options = (
        {"total_step": 10, "target_modules": ["q_proj"]}
        if kind is AdaLoraConfig
        else {"num_virtual_tokens": 4}
    )
    config = kind(task_type="CAUSAL_LM", **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(
        UnsupportedModelError, match=f"uses PEFT's {config.peft_type.value}.*train a LoRA"
    ):
        StoredModel.open(str(tmp_path / "adapter"))


def test_a_method_that_peft_does_not_have_is_refused(model_dir, tmp_path):
    with_lora(AutoModelForCausalLM.from_pretrained(model_dir)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "MAGIC"}))
    for open_it in (StoredModel.open, load_model):
        with pytest.raises(UnsupportedModelError, match=r"names no method of PEFT.*MAGIC"):
            open_it(str(tmp_path))
