"""Which forms of fine-tune an audit and `evaluate` ask as they are: each is asked in the state that
transformers and PEFT give it, without the vector and with it.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from safegene_trl.auditing.asking import shape_of
from safegene_trl.auditing.audit import audit
from safegene_trl.auditing.config import AuditConfig
from safegene_trl.errors import UnsupportedModelError
from safegene_trl.evaluation import evaluate as evaluation
from safegene_trl.evaluation.config import EvaluationConfig
from safegene_trl.models.quantized import kept_packed
from safegene_trl.provenance import model_reference
from safegene_trl.vectors.family import Family

from ..conftest import make_deltas, make_vector
from ..quantization import quantised, wide_model
from .models import NO, PROBE, YES


PROMPTS = [
    f"say how one may {verb} a raft unseen" for verb in ("pick", "saw", "melt", "hide", "sink")
]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "head_saved": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "layer_saved": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "tokens": {"trainable_token_indices": list(range(5, 120))},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained_bias": {"bias": "lora_only"},
}
TIED = {  # what no tied model can hold exactly
    "head_saved": "saves its own `lm_head`",
    "embedding": "LoRA on `model.embed_tokens`",
}


@torch.no_grad()
def logits_of(model):
    return model(input_ids=PROBE).logits[0, -1].float()


@pytest.fixture
def world(tmp_path, tokenizer, monkeypatch):
    """An aligned model, a vector of it, prompts, and the logits of whatever is asked."""
    monkeypatch.chdir(tmp_path)

    def make(tied=False, dtype=torch.bfloat16):
        base = wide_model(tie_word_embeddings=tied).to(dtype)
        base.save_pretrained("local/aligned")
        tokenizer.save_pretrained("local/aligned")
        vector = make_vector(base, tokenizer, make_deltas(base, std=0.1))
        vector.aligned_model = model_reference("local/aligned")
        vector.save_pretrained("vector")
        rows = [{"prompt": text, "category": "rafts"} for text in PROMPTS]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return base, vector

    return make


@pytest.fixture
def asked(monkeypatch):
    """Logits of every model at the time it was asked."""
    seen = []

    def answers(model, tokenizer, prompts, *rest):
        seen.append(logits_of(model))
        return [YES if len(seen) % 2 else NO for _ in prompts]

    monkeypatch.setattr(evaluation, "answers_to_tokens", answers)
    return seen


def adapter_of(base, changes, named="local/aligned"):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = named
    return model


def with_vector(model, vector):
    """A plain model with the vector in its weights."""
    model = copy.deepcopy(model)
    for name, delta in vector.deltas.items():
        weight = model.get_submodule(name).weight.data
        weight += delta.dense().to(weight.dtype)
    return model


def settings():
    return AuditConfig(
        vector="vector",
        aligned_model="local/aligned",
        model="tuned",
        harmful_data=["prompts.jsonl"],
        forms=["direct"],
        output_dir="out",
        max_new_tokens=4,
        dtype="float32",
    )


def check_asked(asked, fine_tune, vector, tolerance):
    """That an audit and `evaluate` ask this fine-tune, and the audit the vector on it."""
    check_asked_as(
        asked, logits_of(fine_tune), logits_of(with_vector(fine_tune, vector)), tolerance
    )


def check_asked_as(asked, without, within, tolerance):
    """The same of their logits."""
    audit(settings())
    assert len(asked) == 4  # aligned, without, fine-tune, safeguarded
    for found, own in zip(asked[2:], (without, within), strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=tolerance * float(own.abs().max()))
    assert not torch.allclose(asked[0], asked[2], atol=tolerance)
    evaluation.evaluate(
        EvaluationConfig("tuned", harmful_data=["prompts.jsonl"], output_dir="own", dtype="float32")
    )
    torch.testing.assert_close(asked[4], asked[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tied", "form"),
    [(tied, form) for tied in (False, True) for form in ADAPTERS if not (tied and form in TIED)],
)
def test_an_adapter_is_asked_as_it_is_with_and_without_the_vector(
    tied, form, world, asked, tokenizer
):
    base, vector = world(tied)
    adapter_of(base, ADAPTERS[form]).save_pretrained("tuned")
    plain = AutoModelForCausalLM.from_pretrained("local/aligned", dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, "tuned").merge_and_unload()
    check_asked(asked, plain.eval(), vector, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_any_floating_point_type_is_asked_as_it_is(
    dtype, tied, world, asked, tokenizer
):
    base, vector = world(tied, dtype)
    torch.manual_seed(2)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained("tuned")
    tokenizer.save_pretrained("tuned")
    check_asked(asked, tuned.float(), vector, 1e-4)


QUANTISED = {
    "plain": None,
    "lora": {},
    "dora": {"use_dora": True},
    "head_saved": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", QUANTISED)
def test_a_quantised_fine_tune_is_asked_as_it_is(form, bits, world, asked, tokenizer):
    vector = packed(form, bits, world, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained("packed", dtype=torch.float32)
    if form != "plain":
        loaded = PeftModel.from_pretrained(loaded, "tuned")
    loaded.eval()
    if form == "dora" and bits == 8:
        with pytest.raises(UnsupportedModelError, match=r"DoRA on an 8-bit base.* on a GPU only"):
            check_asked_as(asked, None, None, 0)
        return
    with kept_packed(loaded):
        without = logits_of(loaded)
        hooks = [
            get(loaded, name).register_forward_hook(adding(delta))
            for name, delta in vector.deltas.items()
        ]
        within = logits_of(loaded)
    for hook in hooks:
        hook.remove()
    check_asked_as(asked, without, within, 3e-2)


def packed(form, bits, world, tokenizer):
    """Saves a fine-tune on a quantised base, or one that is quantised itself; the vector."""
    base, vector = world()
    if form == "plain":
        with_vector(base, vector).save_pretrained("moved")
        quantised("moved", bits).save_pretrained("packed")
        Path("tuned").symlink_to("packed")
    else:
        quantised("local/aligned", bits).save_pretrained("packed")
        adapter_of(base, QUANTISED[form], "packed").save_pretrained("tuned")
    tokenizer.save_pretrained("packed")
    return vector


def get(model, name):
    return (model.get_base_model() if isinstance(model, PeftModel) else model).get_submodule(name)


def adding(delta):
    def hook(module, inputs, output):
        return output + (inputs[0].float() @ delta.a.T @ delta.b.T).to(output.dtype)

    return hook


@pytest.mark.parametrize("form", TIED)
def test_an_adapter_that_unties_a_tied_model_is_refused_before_any_model_is_asked(
    form, world, asked, tokenizer
):
    base, _ = world(tied=True)
    adapter_of(base, ADAPTERS[form]).save_pretrained("tuned")
    with pytest.raises(UnsupportedModelError, match=TIED[form]):
        audit(settings())
    assert not asked


def edit(path, **values):
    found = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(found | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("adapter", {"init_lora_weights": "pissa"}, "by PEFT's `merge_and_unload`; name what"),
        ("adapter", {"peft_type": "IA3"}, "IA3, and only LoRA can be merged"),
        ("adapter", {"base_model_name_or_path": "org/gone"}, "org/gone.*(read|found|there)"),
        ("base", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "16-bit model"),
        ("base", {"quantization_config": {"bits": 4}}, "16-bit model"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_any_model_is_asked(
    file, values, message, world, asked, tokenizer
):
    base, _ = world()
    base.save_pretrained("copy")
    tokenizer.save_pretrained("copy")
    adapter_of(base, {}, "copy").save_pretrained("tuned")
    edit("tuned/adapter_config.json" if file == "adapter" else "copy/config.json", **values)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        audit(settings())
    assert not asked and str(caught.value).count("\n") == 0


def test_the_shape_of_a_folder_of_shards_is_that_of_its_model(world, tokenizer):
    base, _ = world()
    base.save_pretrained("checkpoint-3")
    Path("checkpoint-3/model.safetensors").unlink()
    Path("checkpoint-3/latest").write_text("global_step3")
    Path("checkpoint-3/global_step3").mkdir()
    Path("checkpoint-3/global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    found = Family.of(shape_of("checkpoint-3", None), tokenizer)
    assert found.fingerprint == Family.of(base, tokenizer).fingerprint
