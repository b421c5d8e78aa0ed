"""Fine-tunes of the embeddings and the output head, tied or not: merged as they compute."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safegene_trl.errors import UnsupportedModelError
from safegene_trl.models.supported import check_adapter_output, check_supported

from ..conftest import make_deltas, make_model, with_lora
from .test_architectures import assert_one_model, saved


TOKENS = [5, 7, 299]
CASES = {
    "tokens": {"tied": False, "trainable_token_indices": TOKENS},
    "tokens of a tied pair": {"tied": True, "trainable_token_indices": TOKENS},
    "tokens of scaled embeddings": {
        "kind": "gemma2",
        "tied": True,
        "trainable_token_indices": TOKENS,
    },
    "tokens and a LoRA on the head": {
        "tied": False,
        "trainable_token_indices": TOKENS,
        "target_modules": ["q_proj", "lm_head"],
    },
    "a LoRA on the head": {"tied": False, "target_modules": ["q_proj", "lm_head"]},
    "a LoRA on the embeddings": {"tied": False, "target_modules": ["q_proj", "embed_tokens"]},
    "a LoRA on scaled embeddings": {
        "kind": "gemma2",
        "tied": False,
        "target_modules": ["q_proj", "embed_tokens"],
    },
    "a LoRA on both": {"tied": False, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


def trained(kind="llama", tied=False, **options):
    """A base model, and the like of it with an adapter whose every tensor was trained."""
    adapted = with_lora(make_model(kind, tied=tied), **{"target_modules": ["q_proj"]} | options)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name or "lora_embedding" in name:
                parameter.add_(torch.randn_like(parameter))
    return make_model(kind, tied=tied), adapted


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_what_is_written(case, tmp_path):
    base, adapted = trained(**CASES[case])
    adapted.peft_config["default"].base_model_name_or_path = str(saved(base, tmp_path / "base"))
    tuned = saved(adapted, tmp_path / "tuned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = PeftModel.from_pretrained(loaded, tuned).eval()
    ids = torch.tensor([[*TOKENS, 9, 11]])
    with torch.no_grad(), live.disable_adapter():
        before = live(ids).logits
    with torch.no_grad():
        assert (live(ids).logits - before).abs().max() > 0.1
    assert_one_model(live, tuned, make_deltas(base), tmp_path)


@pytest.mark.parametrize("case", ["tokens", "a LoRA on the embeddings"])
def test_an_adapter_of_linear_layers_cannot_hold_it(case):
    _, adapted = trained(**CASES[case])
    check_supported(adapted)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens`.*output_format: merged"):
        check_adapter_output(adapted)


def test_tokens_that_only_one_of_a_tied_pair_has_are_refused():
    _, adapted = trained(tied=True, trainable_token_indices=TOKENS)
    adapted.get_base_model().lm_head = adapted.get_base_model().lm_head.original_module
    with pytest.raises(UnsupportedModelError, match=r"single tokens of .*ensure_weight_tying"):
        check_supported(adapted)
