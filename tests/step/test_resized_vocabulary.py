"""Fine-tunes with tokens of their own, full and LoRA: in training, from files, and what is kept."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from safegene_trl import FamilyError, SafeGeneCallback, UnsupportedModelError
from safegene_trl.checkpoints.loading import load_model
from safegene_trl.models.parameters import canonical_modules, unadapted
from safegene_trl.step.apply import apply

from ..conftest import config_of, make_model, make_tokenizer, make_vector
from ..test_callback import sft
from .test_wrappers import QUICK


ROWS = 384  # one token more than 320, padded to a multiple of 64
IDS = torch.tensor([[320, 5, 6, 7], [8, 9, 10, 320]])
LORA = {"lora": {}, "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]}}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def base(tied, tokenizer, tmp_path):
    """An aligned model of 320 tokens; a vector of its family lies beside it."""
    make_model(tied=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    make_vector(make_model(tied=tied), tokenizer).save_pretrained(tmp_path / "vector")
    return tmp_path / "base"


def more_tokens():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    return tokenizer


def resized(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(more_tokens()), pad_to_multiple_of=64)
    return model


def lora_config(kind, tied):
    return LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        ensure_weight_tying=tied and kind == "saved whole",
        **LORA[kind],
    )


@torch.no_grad()
def check_merged(report, target, fine_tune, tied):
    """The checkpoint computes what the fine-tune plus the vector does, new token and all."""
    assert report["model"]["added_tokens"] == {"count": 1, "first": ["<|new pad|>"]}
    assert report["model"]["vocab_size"] == ROWS
    vector = make_vector(make_model(tied=tied), make_tokenizer())
    kind = report["config"]["search"]["granularity"]
    by_module = vector.space(kind).by_module(report["coefficients"])
    modules = canonical_modules(fine_tune)
    for name, delta in vector.deltas.items():
        change = delta.b @ (by_module[name][:, None] * delta.a)
        unadapted(modules[name]).weight.add_(change)
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert merged.config.vocab_size == ROWS and merged.config.tie_word_embeddings == tied
    expected = fine_tune.eval()(IDS).logits
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", *LORA])
def test_training(kind, base, tied, tmp_path):
    callback = SafeGeneCallback(config_of(vector=str(tmp_path / "vector"), **QUICK))
    adapter = None if kind == "full" else lora_config(kind, tied)
    trainer = sft(
        tmp_path / "out", [callback], more_tokens(), model=resized(base), peft_config=adapter
    )
    trainer.train()
    with torch.no_grad():  # what the step has kept is all of it, the embeddings too
        kept = load_model(str(tmp_path / "out"))
        torch.testing.assert_close(kept(IDS).logits, trainer.model.eval()(IDS).logits)
    check_merged(callback.report, tmp_path / "out" / "safeguarded", trainer.model, tied)


def stored(kind, base, tied, folder, **kwargs):
    torch.manual_seed(0)
    model = resized(base)
    if kind != "full":
        model = get_peft_model(model, lora_config(kind, tied))
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **kwargs)
    more_tokens().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["full", *LORA])
def test_from_files(kind, base, tied, tmp_path):
    model = stored(kind, base, tied, tmp_path / "tuned")
    with torch.no_grad():
        loaded = load_model(str(tmp_path / "tuned"))(IDS).logits
        torch.testing.assert_close(loaded, model(IDS).logits)
    target = tmp_path / "out"
    config = config_of(vector=str(tmp_path / "vector"), output_dir=str(target))
    report = apply(config, tmp_path / "tuned", coefficients=0.5)
    check_merged(report, target, model, tied)


def test_a_full_fine_tune_is_the_base_of_its_adapter(base, tied, tmp_path):
    model, target = stored("full", base, tied, tmp_path / "tuned"), tmp_path / "out"
    place = {"vector": str(tmp_path / "vector"), "output_dir": str(target)}
    config = config_of(**place, output_format="both")
    report = apply(config, tmp_path / "tuned", coefficients=0.5)
    check_merged(report, target, model, tied)  # to which it adds the vector
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        written = PeftModel.from_pretrained(tuned, target / "adapter")(IDS).logits
        torch.testing.assert_close(written, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_would_lack_the_embeddings_is_refused(base, tied, tmp_path):
    config = config_of(
        vector=str(tmp_path / "vector"), output_dir=str(tmp_path / "out"), output_format="adapter"
    )
    stored("lora", base, tied, tmp_path / "tuned")
    words = "a vocabulary of 384 tokens and its base model .* one of 320"
    with pytest.raises(UnsupportedModelError, match=words):
        apply(config, tmp_path / "tuned", coefficients=0.5)
    callback = SafeGeneCallback(config)
    model = get_peft_model(resized(base), lora_config("lora", tied))
    trainer = sft(tmp_path / "trained", [callback], more_tokens(), model=model)
    with pytest.raises(UnsupportedModelError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_adapters_without_all_of_their_embeddings_are_refused(base, tied, tmp_path):
    config = config_of(vector=str(tmp_path / "vector"), output_dir=str(tmp_path / "out"))
    stored("lora", base, tied, tmp_path / "none", save_embedding_layers=False)
    with pytest.raises(FamilyError, match="has the id 320 and the model's embedding 320 rows"):
        apply(config, tmp_path / "none", coefficients=0.5)
    if not tied:
        adapter = LoraConfig(
            r=4,
            target_modules=["q_proj"],
            task_type="CAUSAL_LM",
            modules_to_save=["embed_tokens"],
        )
        model = get_peft_model(resized(base), adapter)
        model.save_pretrained(tmp_path / "half", save_embedding_layers=False)
        more_tokens().save_pretrained(tmp_path / "half")
        with pytest.raises(UnsupportedModelError, match="does not hold its `lm_head`"):
            apply(config, tmp_path / "half", coefficients=0.5)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[320]
    )
    get_peft_model(resized(base), adapter).save_pretrained(tmp_path / "tokens")
    more_tokens().save_pretrained(tmp_path / "tokens")
    with pytest.raises(UnsupportedModelError, match="trains single tokens of a resized vocabulary"):
        apply(config, tmp_path / "tokens", coefficients=0.5)
