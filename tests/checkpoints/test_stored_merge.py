"""Checkpoints merged from their files, block by block, equal those merged from the loaded model."""

import json

import pytest
import torch
from peft import (
    PeftModel,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from safegene_trl.checkpoints import row_blocks
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.checkpoints.stored_merge import check_written, write_merged
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.checkpoints.tensor_file import stored_tensors
from safegene_trl.errors import CheckpointError, OutputError, UnsupportedModelError
from safegene_trl.models.data_types import WrittenTypes
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import ALONE, make_deltas, make_model, small_shape, with_lora


COEFFICIENTS = {"model.layers.1.self_attn.q_proj": 0.0}


def saved(model, tokenizer, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return folder


def merged_both_ways(source, live, tokenizer, tmp_path, monkeypatch, shard_size="5GB"):
    """Tensors of the checkpoint merged from the files of `source` and of the one merged from
    `live`.
    """
    deltas = make_deltas(make_model())
    coefficients = {name: COEFFICIENTS.get(name, 0.7) for name in deltas}
    for name in ("streamed", "loaded"):
        (tmp_path / name).mkdir()
    # many blocks, the last one of a tensor a short one
    monkeypatch.setattr(row_blocks, "BLOCK_ITEMS", 100)
    write_merged(
        StoredModel.open(str(source)),
        ScaledVector(deltas, coefficients),
        CheckpointFolder(tmp_path / "streamed", tokenizer, shard_size),
    )
    save_merged(
        live,
        ScaledVector(deltas, coefficients),
        CheckpointFolder(tmp_path / "loaded", tokenizer, shard_size),
        ALONE,
    )
    return [
        {
            name: tensor
            for file in (tmp_path / name_of).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for name_of in ("streamed", "loaded")
    ]


def assert_same(streamed, loaded):
    assert streamed.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert streamed[name].dtype == tensor.dtype
        torch.testing.assert_close(streamed[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint(kind, tied, tokenizer, tmp_path, monkeypatch):
    source = saved(make_model(kind, tied), tokenizer, tmp_path / "model", max_shard_size="30KB")
    live = AutoModelForCausalLM.from_pretrained(source)
    assert_same(*merged_both_ways(source, live, tokenizer, tmp_path, monkeypatch))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "streamed", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.generation_config.eos_token_id == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj", "down_proj"]},
        {"bias": "all"},
    ],
    ids=["LoRA", "rsLoRA", "DoRA", "modules_to_save", "saved layers", "biases"],
)
def test_adapter(options, tokenizer, tmp_path, monkeypatch):
    kind = "qwen2" if "bias" in options else "llama"
    base = saved(make_model(kind, tied=False), tokenizer, tmp_path / "base")
    adapted = with_lora(make_model(kind, tied=False), **options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter.add_(0.1)
            if ".modules_to_save." in name and ".layers." in name:
                parameter.mul_(1.5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    saved(adapted, tokenizer, tmp_path / "adapter")
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert_same(*merged_both_ways(tmp_path / "adapter", live, tokenizer, tmp_path, monkeypatch))


def test_bfloat16_in_shards_of_bounded_size(tokenizer, tmp_path, monkeypatch):
    source = saved(make_model().to(torch.bfloat16), tokenizer, tmp_path / "model")
    live = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    streamed, loaded = merged_both_ways(
        source, live, tokenizer, tmp_path, monkeypatch, shard_size="20KB"
    )
    files = list((tmp_path / "streamed").glob("model-*.safetensors"))
    assert len(files) > 2 and stored_tensors(tmp_path / "streamed").keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert streamed[name].dtype == torch.bfloat16
        assert (
            streamed[name] == tensor
        ).float().mean() > 0.999  # an order of additions may flip a tie


def test_renamed_experts(tmp_path, tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
    )
    source = saved(MixtralForCausalLM(config), tokenizer, tmp_path / "model")
    stored = StoredModel.open(str(source))
    name = "model.layers.1.self_attn.o_proj"
    delta = LowRankDelta(torch.randn(2, 32), torch.randn(32, 2))
    (tmp_path / "out").mkdir()
    write_merged(
        stored,
        ScaledVector({name: delta}, {name: 1.0}),
        CheckpointFolder(tmp_path / "out", tokenizer, "5GB"),
    )
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert before.keys() == after.keys() and changed == [f"{name}.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] + delta.dense())
    experts = (
        "model.layers.0.mlp.experts.gate_up_proj"  # one tensor in the model, eight in the files
    )
    with pytest.raises(UnsupportedModelError, match="another form"):
        write_merged(
            stored,
            ScaledVector({experts: delta}, {experts: 1.0}),
            CheckpointFolder(tmp_path / "out", tokenizer, "5GB"),
        )


def merged_plainly(source, tokenizer, folder, coefficient, deltas=None):
    folder.mkdir()
    deltas = make_deltas(make_model()) if deltas is None else deltas
    return write_merged(
        StoredModel.open(str(source)),
        ScaledVector(deltas, dict.fromkeys(deltas, coefficient)),
        CheckpointFolder(folder, tokenizer, "5GB"),
    )


def test_what_rounding_left_is_told(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ITEMS", 100)
    source = saved(make_model().to(torch.bfloat16), tokenizer, tmp_path / "model")
    deltas = make_deltas(make_model())
    found = merged_plainly(source, tokenizer, tmp_path / "out", 1e-2).check()
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    real = {
        name: after[f"{name}.weight"].float() - before[f"{name}.weight"].float() for name in deltas
    }
    wanted = {name: 1e-2 * delta.dense() for name, delta in deltas.items()}
    assert found["weights"] == sum(change.numel() for change in wanted.values())
    assert found["changed_weights"] == sum(int(change.count_nonzero()) for change in real.values())
    assert 0 < found["changed_weights"] < found["weights"]
    product = sum(float((real[name] * wanted[name]).sum()) for name in deltas)
    square = sum(float(change.square().sum()) for change in wanted.values())
    assert found["kept"] == pytest.approx(product / square, rel=1e-3)


def test_a_vector_that_is_rounded_away_is_refused(tokenizer, tmp_path):
    source = saved(make_model().to(torch.bfloat16), tokenizer, tmp_path / "model")
    tiny = {
        "model.layers.1.mlp.up_proj": LowRankDelta(
            torch.full((1, 32), 1e-6), torch.full((48, 1), 1e-6)
        )
    }
    with pytest.raises(OutputError, match="0 of 1536 weights would change"):
        merged_plainly(source, tokenizer, tmp_path / "out", 0.5, tiny)
    assert (
        merged_plainly(source, tokenizer, tmp_path / "none", 0.0, tiny).check()["changed_weights"]
        == 0
    )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_stored_weights_that_are_no_numbers_are_refused(name, tokenizer, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = float("nan")
    source = saved(model, tokenizer, tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=rf"`{name}` in .*model\.safetensors holds NaN or infinity"
    ):
        merged_plainly(source, tokenizer, tmp_path / "out", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_overflow_by_the_vector_are_refused(dtype, tokenizer, tmp_path):
    source = saved(make_model().to(dtype), tokenizer, tmp_path / "model")
    with pytest.raises(OutputError, match=r"`model.layers.*weight` would hold NaN or infinity"):
        merged_plainly(source, tokenizer, tmp_path / "out", 1e40 if dtype == torch.float32 else 1e6)


@pytest.mark.parametrize("part", ["lora_B", "modules_to_save"])
def test_a_diverged_adapter_is_refused(part, tokenizer, tmp_path):
    base = saved(make_model(tied=False), tokenizer, tmp_path / "base")
    adapted = with_lora(make_model(tied=False), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if part in name:
                parameter.view(-1)[1] = float("inf")
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    saved(adapted, tokenizer, tmp_path / "adapter")
    with pytest.raises((CheckpointError, OutputError), match=r"diverged|NaN or infinity"):
        merged_plainly(tmp_path / "adapter", tokenizer, tmp_path / "out", 0.0)


def test_the_config_keeps_its_data_type_and_names_its_class(tokenizer, tmp_path):
    source = saved(make_model().to(torch.bfloat16), tokenizer, tmp_path / "model")
    merged_plainly(source, tokenizer, tmp_path / "out", 0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])


def test_tied_modules_saved_whole_are_merged(tokenizer, tmp_path, monkeypatch):
    base = saved(make_model(), tokenizer, tmp_path / "base")
    adapted = with_lora(make_model(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        adapted.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    saved(adapted, tokenizer, tmp_path / "adapter")
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    streamed, loaded = merged_both_ways(
        tmp_path / "adapter", live, tokenizer, tmp_path, monkeypatch
    )
    assert_same(streamed, loaded)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(streamed[name], make_model().get_parameter(name) + 0.1)
    assert "lm_head.weight" not in streamed


def test_a_tied_weight_under_both_names_changes_under_both(tokenizer, tmp_path):
    base = saved(make_model(), tokenizer, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapted = with_lora(make_model(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        adapted.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    saved(adapted, tokenizer, tmp_path / "adapter")
    merged_plainly(tmp_path / "adapter", tokenizer, tmp_path / "out", 0.5)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    torch.testing.assert_close(after["lm_head.weight"], tensors["lm_head.weight"] + 0.1)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_vector_on_a_tied_weight_is_refused(module, tokenizer, tmp_path):
    source = saved(make_model(), tokenizer, tmp_path / "model")
    delta = {module: LowRankDelta(torch.ones(1, 32), torch.ones(320, 1))}
    with pytest.raises(
        UnsupportedModelError, match=f"changes `{module}`, whose weight the model shares"
    ):
        merged_plainly(source, tokenizer, tmp_path / "out", 0.5, delta)
    free = saved(make_model(tied=False), tokenizer, tmp_path / "free")
    if module == "lm_head":
        merged_plainly(free, tokenizer, tmp_path / "merged", 0.5, delta)
        before, after = (
            load_file(each / "model.safetensors") for each in (free, tmp_path / "merged")
        )
        torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] + 0.5)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["LoRA", "saved"])
def test_the_sum_is_cast_once_to_the_type_that_is_asked(
    held, dtype, options, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(row_blocks, "BLOCK_ITEMS", 100)
    base = make_model(tied=False).to(getattr(torch, held))
    saved(base, tokenizer, tmp_path / "base")
    adapted = with_lora(make_model(tied=False), **options)
    with torch.no_grad():
        if options:
            adapted.base_model.lm_head.modules_to_save["default"].weight.add_(1e-3)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    deltas = make_deltas(make_model())
    vector = ScaledVector(deltas, dict.fromkeys(deltas, 0.7))

    def written(name):
        stored = StoredModel.open(str(tmp_path / "adapter"))
        stored.types = WrittenTypes.of_model(stored.model, name)
        (tmp_path / name).mkdir()
        folder = CheckpointFolder(tmp_path / name, tokenizer, "5GB")
        write_merged(stored, vector, folder, show_progress=False)
        assert check_written(stored, vector, folder.path) == len(stored.files)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert sum(tensor.nbytes for tensor in tensors.values()) == stored.written_bytes
        named = json.loads((tmp_path / name / "config.json").read_text())["dtype"]
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, named)}
        assert named == name
        return tensors

    exact = written("float32")
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if options:  # its float32 numbers did not pass through the files' type
        assert torch.equal(exact["lm_head.weight"], lora["base_model.model.lm_head.weight"])
    cast = exact if dtype == "float32" else written(dtype)
    for name, tensor in cast.items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))


def test_a_number_that_the_asked_type_cannot_hold_is_named(tokenizer, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 70000.0  # no vector acts on it
    stored = StoredModel.open(str(saved(model, tokenizer, tmp_path / "model")))
    stored.types = WrittenTypes.of_model(stored.model, "float16")
    (tmp_path / "out").mkdir()
    folder, deltas = CheckpointFolder(tmp_path / "out", tokenizer, "5GB"), make_deltas(model)
    with pytest.raises(OutputError, match=r"layers\.0\.mlp\.up_proj\.weight` has a number of 7e"):
        write_merged(stored, ScaledVector(deltas, dict.fromkeys(deltas, 0.7)), folder)


def test_the_config_names_one_type_for_all_models_in_it(tokenizer, tmp_path):
    text = small_shape(num_hidden_layers=1, dtype="bfloat16")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, dtype="bfloat16")
    model = Gemma3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    CheckpointFolder(tmp_path, tokenizer, "5GB").save_record(model, torch.float16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "float16"
    assert written["text_config"].get("dtype", "float16") == "float16"
