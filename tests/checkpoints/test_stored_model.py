"""Which finished models are not opened."""

import json

import pytest
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safegene_trl.checkpoints.loading import load_model
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import UnsupportedModelError

from ..conftest import make_model, with_lora
from .test_stored_merge import saved


def test_quantised_checkpoint_is_refused(tokenizer, tmp_path):
    source = saved(make_model(), tokenizer, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="16-bit"):
        StoredModel.open(str(source))


def test_adapter_that_changed_its_base_is_refused(tokenizer, tmp_path):
    base = saved(make_model(), tokenizer, tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    adapted = get_peft_model(make_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="pissa"):
        StoredModel.open(str(tmp_path / "adapter"))


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
