"""Checkpoint names of live weights, and fine-tunes of every kind that are merged under them."""

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import NO_VECTOR, ScaledVector
from safegene_trl.checkpoints.tensor_file import stored_tensors
from safegene_trl.errors import UnsupportedModelError
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import layer_index
from safegene_trl.models.parameters import (
    canonical_modules,
    canonical_parameters,
    is_transposed,
    linear_shape,
    task_factors,
    tied_weights,
)
from safegene_trl.models.supported import check_adapter_output, check_supported

from ..conftest import ALONE, attached, make_deltas, make_model, small_shape, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.mark.parametrize("tied", [True, False])
def test_a_lora_does_not_change_the_names(tied):
    plain = [(p.name, p.tensor.shape) for p in canonical_parameters(make_model(tied=tied))]
    adapted = [
        (p.name, p.tensor.shape) for p in canonical_parameters(with_lora(make_model(tied=tied)))
    ]
    assert sorted(plain) == sorted(adapted)
    assert ("lm_head.weight" in dict(plain)) == (not tied)
    modules = canonical_modules(with_lora(make_model()))
    assert linear_shape(modules["model.layers.0.mlp.up_proj"]) == (48, 32)
    assert linear_shape(modules["model.norm"]) is None


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.12.mlp.up_proj", 12),
        ("transformer.h.3.attn.c_attn", 3),
        ("lm_head", None),
        ("a.block2.b", None),
    ],
)
def test_layer_index(name, index):
    assert layer_index(name) == index


def test_only_active_unmerged_adapters_count():
    model = with_lora(make_model())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    name = "model.layers.0.mlp.up_proj"
    assert len(task_factors(canonical_modules(model)[name])) == 1
    model.base_model.set_adapter(["default", "other"])
    assert len(task_factors(canonical_modules(model)[name])) == 2
    model.merge_adapter()
    assert task_factors(canonical_modules(model)[name]) == []


def test_rank_stabilised_scaling_is_in_the_factors():
    model = with_lora(make_model(), use_rslora=True)
    module = canonical_modules(model)["model.layers.0.mlp.up_proj"]
    (factors,) = task_factors(module)
    a, b = factors.pair()
    torch.testing.assert_close(b @ a, module.get_delta_weight("default"))


def test_transposed_layers_merge_right(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    config = LoraConfig(
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(**shape)), config).eval()
    module = canonical_modules(model)["transformer.h.0.attn.c_attn"]
    assert is_transposed(module) and linear_shape(module) == (96, 32)
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_modules_to_save_are_merged_when_untied(tokenizer, tmp_path):
    model = with_lora(make_model(tied=False), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    check_supported(model)
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_dora_is_folded(tokenizer, tmp_path):
    model = with_lora(make_model(), use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.2)
    deltas = make_deltas(make_model())
    coefficients = dict.fromkeys(deltas, 0.5)
    check_supported(model)
    save_merged(
        model,
        ScaledVector(deltas, coefficients),
        CheckpointFolder(tmp_path, tokenizer, "5GB"),
        ALONE,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), attached(model, deltas, 0.5):
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        check_adapter_output(model)


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}],
    ids=["PiSSA", "OLoRA", "biases"],
)
def test_other_kinds_of_lora_are_merged(options, tokenizer, tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(make_model("qwen2"), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
    check_supported(model)
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    if "init_lora_weights" in options:
        with pytest.raises(UnsupportedModelError, match=options["init_lora_weights"]):
            check_adapter_output(model)


@pytest.mark.parametrize(
    "kind", [(MixtralConfig, MixtralForCausalLM), (Qwen3MoeConfig, Qwen3MoeForCausalLM)]
)
def test_experts_are_saved_under_their_names_in_files(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 24, "decoder_sparse_step": 1, "num_hidden_layers": 2}
    config = kind[0](**small_shape(**experts, **sizes))
    model = kind[1](config).eval()
    name = "model.layers.1.self_attn.o_proj"
    deltas = {name: LowRankDelta(torch.randn(2, 32), torch.randn(32, 2))}
    check_supported(model)
    merged_dir = tmp_path / "merged"
    merged_dir.mkdir()
    model.save_pretrained(tmp_path / "own")
    save_merged(
        model,
        ScaledVector(deltas, {name: 0.5}),
        CheckpointFolder(merged_dir, tokenizer, "20KB"),
        ALONE,
    )
    own, merged = stored_tensors(tmp_path / "own"), stored_tensors(merged_dir)
    assert own.keys() == merged.keys() and any("experts.3" in tensor for tensor in own)
    loaded, info = kind[1].from_pretrained(merged_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad(), attached(model, deltas, 0.5):
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def gpt2():
    """A model that ties its head to embeddings of another name."""
    shape = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1)).eval()


def test_tied_weights():
    pair = {"lm_head.weight", "model.embed_tokens.weight"}
    assert tied_weights(make_model()) == dict.fromkeys(pair, pair)
    assert tied_weights(with_lora(make_model(), modules_to_save=["lm_head"])) == dict.fromkeys(
        pair, pair
    )
    assert tied_weights(make_model(tied=False)) == {}
    assert set(tied_weights(gpt2())) == {"lm_head.weight", "transformer.wte.weight"}
    shared = make_model(tied=False)  # by nothing but the tensors themselves
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    assert set(tied_weights(shared)) == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}


def test_tied_modules_that_are_saved_whole_together_are_merged(tokenizer, tmp_path):
    model = with_lora(make_model(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(0.1)
    check_supported(model)
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
