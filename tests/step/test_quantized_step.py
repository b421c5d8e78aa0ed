"""The safety step on a fine-tune whose base bitsandbytes holds in 4 or 8 bits."""

import json

import pytest
import torch
from jsonschema import validate
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback

from safegene_trl import SafeGeneCallback
from safegene_trl.commands.main import main
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.errors import (
    CheckpointError,
    ConfigError,
    FamilyError,
    RejectedError,
    UnexpectedError,
    UnsupportedModelError,
)
from safegene_trl.models.experts import can_be_changed, matrix_shapes
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import canonical_modules
from safegene_trl.provenance import model_reference
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step import live_fine_tune, quantized_step
from safegene_trl.step.apply import apply
from safegene_trl.step.plan import InputModel, Origin
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import ALONE, config_of, make_vector, small_shape
from ..quantization import packed, quantised, same, wide_model
from ..test_callback import sft


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def base_dir(tmp_path, tokenizer):
    wide_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def config(tmp_path, tokenizer):
    """Accepts whatever a random vector does to a random model."""
    make_vector(wide_model(), tokenizer, std=0.1).save_pretrained(tmp_path / "vector")

    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 3,
            "min_coefficient": 0.2,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
            "granularity": "module",
        }
        return config_of(**{"vector": str(tmp_path / "vector")} | quick | values)

    return make


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
            rank = scale["r"] ** 0.5 if scale["use_rslora"] else scale["r"]
            total = total + product * scale["lora_alpha"] / rank
        if module in vector.deltas:
            delta = vector.deltas[module]
            total = total + delta.b @ (by_module[module][:, None] * delta.a)
        tensors[name] = total
    return tensors


def check_written(folder, wanted, dtype=torch.bfloat16):
    written = load_file(folder / "model.safetensors")
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == dtype
        torch.testing.assert_close(written[name].float(), tensor, rtol=2**-7, atol=1e-6)


def test_the_data_type_that_is_asked_for(base_dir, config, tokenizer, tmp_path):
    out, wanted = tmp_path / "out", config(output={"dtype": "float32"})
    _, callback, _ = trained(4, base_dir, wanted, tokenizer, out)
    exact = expected(base_dir, out, callback.report, tmp_path / "vector")
    check_written(out / "safeguarded", exact, torch.float32)
    written = load_file(out / "safeguarded" / "model.safetensors")
    assert any(not torch.equal(t, t.bfloat16().float()) for t in written.values())
    assert json.loads((out / "safeguarded" / "config.json").read_text())["dtype"] == "float32"
    assert callback.report["shipped"]["exact_tensors"] == len(written)


def trained(bits, base_dir, config, tokenizer, out, lora=LORA, **options):
    """A trainer that has trained, its callback, and the bits of the base before."""
    callback = SafeGeneCallback(config)
    model = quantised(base_dir, bits)
    lora = LoraConfig(**lora)
    trainer = sft(out, [callback], tokenizer, model=model, peft_config=lora, **options)
    before = packed(trainer.model)
    trainer.train()
    return trainer, callback, before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_fine_tune_is_merged_into_its_16_bit_base(bits, base_dir, config, tokenizer, tmp_path):
    out = tmp_path / "out"
    trainer, callback, before = trained(bits, base_dir, config(), tokenizer, out)
    assert same(before, packed(trainer.model))
    report, folder = callback.report, out / "safeguarded"
    validate(json.loads((folder / "safegene_report.json").read_text()), SCHEMA)
    assert any(report["coefficients"].values()) and report["fine_tune"] == str(out)
    side = report["shipped"]["base"]
    assert side["recalibrated_on"].startswith(f"{bits}-bit base (bitsandbytes")
    assert side["written"] == f"merged into the bfloat16 base {base_dir}"
    assert "is not measured itself" in report["warnings"][-1]
    assert f"Measured: {bits}-bit base" in (folder / "README.md").read_text().replace("\\", "")
    check_written(folder, expected(base_dir, out, report, tmp_path / "vector"))
    assert report["shipped"]["exact_tensors"] == len(load_file(folder / "model.safetensors"))
    assert report["shipped"]["rounding"]["changed_weights"] > 0
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    lora = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.args.max_steps = 4
    trainer.train()  # goes on
    after = dict(trainer.model.named_parameters())
    assert lora and not any(torch.equal(value, after[name]) for name, value in lora.items())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "input_layernorm"]},
        {"trainable_token_indices": list(range(5, 120))},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_what_else_a_lora_holds_is_merged(lora, config, tokenizer, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    wide_model(tie_word_embeddings=False).save_pretrained(base)
    vector = make_vector(wide_model(tie_word_embeddings=False), tokenizer, std=0.1)
    vector.save_pretrained(tmp_path / "vector")
    trainer, callback, before = trained(
        4, base, config(), tokenizer, out, LORA | lora, learning_rate=1e-2
    )
    assert same(before, packed(trainer.model))
    written = out / "safeguarded"
    embedded = "trainable_token_indices" in lora or "embed_tokens" in lora.get("target_modules", ())
    if "use_dora" not in lora and not embedded:
        wanted = expected(base, out, callback.report, tmp_path / "vector")
    else:
        merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(merged, out).merge_and_unload()
        by_module = vector.space("module").by_module(callback.report["coefficients"])
        for name, delta in vector.deltas.items():
            weight = merged.get_submodule(name).weight.data
            weight += delta.b @ (by_module[name][:, None] * delta.a)
        wanted = {name: tensor.float() for name, tensor in merged.state_dict().items()}
    check_written(written, wanted)
    if embedded:
        before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        own = load_file(written / "model.safetensors")["model.embed_tokens.weight"]
        assert not torch.equal(own, before)
    if "modules_to_save" in lora:
        head = load_file(base / "model.safetensors")["lm_head.weight"]
        assert not torch.equal(load_file(written / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize("output_format", ["adapter", "both"])
def test_an_adapter_is_written_for_the_base_that_was_loaded(
    output_format, base_dir, config, tokenizer, tmp_path
):
    out = tmp_path / "out"
    settings = config(output_format=output_format)
    trainer, callback, before = trained(4, base_dir, settings, tokenizer, out)
    assert same(before, packed(trainer.model))
    report, folder = callback.report, out / "safeguarded"
    validate(json.loads((folder / "safegene_report.json").read_text()), SCHEMA)
    place = folder / "adapter" if output_format == "both" else folder
    named = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base_dir)
    assert report["shipped"]["base"]["written"].endswith("an adapter")
    assert report["shipped"]["logit_distances"]["adapter"] < 0.3
    assert ("exact_tensors" in report["shipped"]) is (output_format == "both")
    wanted = expected(base_dir, out, report, tmp_path / "vector")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), place
    ).merge_and_unload()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    if output_format == "both":
        check_written(folder, wanted)


def test_limits_of_a_gate_are_held_against_the_quantised_model(
    base_dir, config, tokenizer, tmp_path
):
    settings = config(gate={"min_refusal_rate": 0.99}, on_failure="warn")
    trainer, callback, before = trained(4, base_dir, settings, tokenizer, tmp_path / "out")
    assert callback.report["decision"]["outcome"] == "rejected"
    assert callback.report["error"]["kind"] == RejectedError.__name__
    assert callback.report["shipped"]["base"]["measured_on"].startswith("4-bit")
    assert not (tmp_path / "out/safeguarded").exists()
    assert same(before, packed(trainer.model))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_error_inside_the_step_leaves_the_model_as_it_was(
    bits, base_dir, config, tokenizer, tmp_path, monkeypatch
):
    def broken(*args):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(quantized_step, "write_merged", broken)
    callback = SafeGeneCallback(config())
    model, lora = quantised(base_dir, bits), LoraConfig(**LORA)
    trainer = sft(tmp_path / "out", [callback], tokenizer, model=model, peft_config=lora)
    before = packed(trainer.model)
    with pytest.raises(UnexpectedError, match="the disk is gone"):
        trainer.train()
    assert same(before, packed(trainer.model))
    layers = [m for m in trainer.model.modules() if hasattr(m, "_disable_adapters")]
    assert layers and not any(layer._disable_adapters for layer in layers)
    assert not any(
        m._forward_hooks for m in trainer.model.modules() if "lora" in type(m).__module__
    )
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_written_tensor_that_is_another_one_is_found(
    base_dir, config, tokenizer, tmp_path, monkeypatch
):
    original = live_fine_tune.LiveFineTune.write

    def damaged(self, folder, found):
        digests = original(self, folder, found)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-2, 2)
            file.write(b"\0\1")
        return digests

    monkeypatch.setattr(live_fine_tune.LiveFineTune, "write", damaged)
    with pytest.raises(CheckpointError, match="is not the base's tensor with the fine-tune"):
        trained(4, base_dir, config(), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out/safeguarded").exists()


def test_a_base_whose_files_are_quantised_needs_another_one_named(
    base_dir, config, tokenizer, tmp_path
):
    packed_dir, out = tmp_path / "base-bnb-4bit", tmp_path / "out"
    quantised(base_dir, 4).save_pretrained(packed_dir)
    with pytest.raises(
        UnsupportedModelError,
        match=r"base-bnb-4bit.* is quantised itself: name .*merge_base.*`allow_other_base: true`",
    ):
        trained(None, packed_dir, config(), tokenizer, out)
    _, callback, _ = trained(None, packed_dir, config(merge_base=str(base_dir)), tokenizer, out)
    check_written(
        out / "safeguarded", expected(base_dir, out, callback.report, tmp_path / "vector")
    )
    trained(None, packed_dir, config(output_format="adapter"), tokenizer, tmp_path / "second")
    assert (tmp_path / "second/safeguarded/adapter_model.safetensors").is_file()
    wide_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match="is not the one that the quantised base was"):
        trained(None, packed_dir, config(merge_base=str(tmp_path / "other")), tokenizer, out)


def test_the_base_that_is_named_is_the_one_that_the_fine_tune_started_from(
    base_dir, config, tokenizer, tmp_path
):
    """Its files are those that the vector was made on; the quantised ones are not."""
    packed_dir, place, out = tmp_path / "base-bnb-4bit", tmp_path / "own", tmp_path / "out"
    quantised(base_dir, 4).save_pretrained(packed_dir)
    vector = make_vector(wide_model(), tokenizer, std=0.1)
    vector.aligned_model = model_reference(str(base_dir))
    vector.save_pretrained(place)
    settings = config(vector=str(place), merge_base=str(base_dir))
    _, callback, _ = trained(None, packed_dir, settings, tokenizer, out)
    assert callback.report["base"]["is_aligned_model"] is True
    with pytest.raises(FamilyError, match="whose weights are others"):
        trained(
            None, packed_dir, config(vector=str(place), output_format="adapter"), tokenizer, out
        )


def test_a_base_that_is_not_there_is_refused_before_the_first_step(
    base_dir, config, tokenizer, tmp_path
):
    model, lora = quantised(base_dir, 4), LoraConfig(**LORA)
    for name, message in (
        ("", "does not say where its files are"),
        (str(tmp_path / "gone"), "gone.* cannot be read: name its 16-bit model"),
        ("somebody/nothing", "somebody/nothing.* cannot be read"),
    ):
        model.config._name_or_path = name
        trainer = sft(
            tmp_path / "out",
            [SafeGeneCallback(config(allow_other_base=True))],
            tokenizer,
            model=model,
            peft_config=lora,
        )
        with pytest.raises(UnsupportedModelError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        model = trainer.model.unload()


def test_a_base_to_merge_into_is_named_for_merging_into_it(base_dir, config, tokenizer, tmp_path):
    named = {"merge_base": str(base_dir)}
    with pytest.raises(ConfigError, match="merges nothing"):
        trained(4, base_dir, config(output_format="adapter", **named), tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    trainer = sft(tmp_path / "out", [SafeGeneCallback(config(**named))], tokenizer, model=plain)
    with pytest.raises(ConfigError, match="is not quantised: leave it out"):
        trainer.train()
    with pytest.raises(ConfigError, match="beside `coefficients`"):
        apply(config(**named), base_dir, coefficients=0.5)


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_quantised_base_that_is_sharded_is_refused(backend, base_dir, config):
    class Sharded(Sharding):
        """As under `fully_shard`, or ZeRO-3."""

        kind, collective_forward = backend, True

    given = InputModel(quantised(base_dir, 8), None, Origin(str(base_dir), None, "lora"))
    with pytest.raises(
        UnsupportedModelError, match=rf"8-bit base .* and {backend} shards it: launch"
    ):
        quantized_step.quantized_step(config(), given, Sharded(torch.device("cpu")))
    assert quantized_step.quantized_step(config(), given, ALONE).needed_bytes > 0


def test_safegene_sft_trains_on_a_base_in_4_bits(base_dir, config, tmp_path, task_file):
    settings = {
        "model_name_or_path": str(base_dir),
        "dataset_name": "json",
        "datasets": [{"path": "json", "data_files": str(task_file)}],
        "output_dir": str(tmp_path / "out"),
        "use_peft": True,
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "bf16": False,
        "use_cpu": True,
        "max_steps": 1,
        "report_to": "none",
        "safegene": {
            "vector": str(tmp_path / "vector"),
            "search": {"max_utility_loss": 100.0, "utility_weight": 0.0, "max_evaluations": 3}
            | {"min_coefficient": 0.2, "granularity": "module"},
            "measure": {"num_test_prompts": 2, "max_new_tokens": 2},
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    assert main(["sft", "--config", str(tmp_path / "recipe.yaml")]) == 0
    report = json.loads((tmp_path / "out/safeguarded/safegene_report.json").read_text())
    assert report["shipped"]["base"]["recalibrated_on"].startswith("4-bit base (bitsandbytes, nf4")
    check_written(
        tmp_path / "out/safeguarded",
        expected(base_dir, tmp_path / "out", report, tmp_path / "vector"),
    )


def test_apply_on_an_adapter_whose_base_has_quantised_files(
    base_dir, config, tokenizer, tmp_path, task_file
):
    packed_dir, out = tmp_path / "base-bnb-8bit", tmp_path / "out"
    quantised(base_dir, 8).save_pretrained(packed_dir)
    tokenizer.save_pretrained(packed_dir)
    trainer = sft(
        out, [], tokenizer, model=quantised(packed_dir, None), peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    trainer.save_model()
    settings = {"task_data": str(task_file), "output_dir": str(tmp_path / "safe")}
    with pytest.raises(UnsupportedModelError, match="is quantised itself"):
        apply(config(**settings), out)
    with pytest.raises(UnsupportedModelError, match="is a quantised checkpoint"):
        apply(config(**settings), out, coefficients=0.5)
    report = apply(config(merge_base=str(base_dir), **settings), out)
    assert report["shipped"]["base"]["measured_on"].startswith("8-bit base")
    check_written(tmp_path / "safe", expected(base_dir, out, report, tmp_path / "vector"))


@pytest.mark.parametrize("search", [False, True])
def test_apply_merges_an_adapter_of_a_quantised_training_into_the_16_bit_base(
    search, base_dir, config, tokenizer, tmp_path, task_file
):
    """Trained as people do, with norms and embeddings in float32."""
    model = prepare_model_for_kbit_training(quantised(base_dir, 4), False)
    trainer = sft(
        tmp_path / "out", [], tokenizer, model=model, peft_config=LoraConfig(**LORA), bf16=True
    )
    trainer.train()
    trainer.save_model()
    settings = config(task_data=str(task_file), output_dir=str(tmp_path / "safe"))
    report = apply(settings, tmp_path / "out", coefficients=None if search else 0.5)
    check_written(
        tmp_path / "safe", expected(base_dir, tmp_path / "out", report, tmp_path / "vector")
    )
    assert "base" not in report["shipped"]  # nothing was quantised here


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_holds_an_earlier_lora_is_refused(bits, base_dir, config, tokenizer, tmp_path):
    """Merged into the quantised weights it is in no file: it would be lost."""
    model = quantised(base_dir, bits)
    earlier = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model = earlier.merge_and_unload()
    lora = LoraConfig(**LORA)
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path / "out", [callback], tokenizer, model=model, peft_config=lora)
    with pytest.raises(UnsupportedModelError, match="is not the one that the quantised base was"):
        trainer.train()


def test_a_base_whose_files_change_during_the_training_is_refused(
    base_dir, config, tokenizer, tmp_path
):
    class Changing(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            other = wide_model()
            other.model.layers[-1].mlp.up_proj.weight.data.neg_()
            other.save_pretrained(base_dir)

    callback = SafeGeneCallback(config())
    trainer = sft(
        tmp_path / "out",
        [Changing(), callback],
        tokenizer,
        model=quantised(base_dir, 4),
        peft_config=LoraConfig(**LORA),
    )
    with pytest.raises(CheckpointError, match="have changed since the training began"):
        trainer.train()
    assert not (tmp_path / "out" / "safeguarded").exists()


def test_a_vector_with_experts_is_measured_beside_a_quantised_base(
    config, tokenizer, tmp_path, monkeypatch
):
    """Experts stay as they are in memory, unquantised; those of a parameter share a coefficient."""
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    torch.manual_seed(0)
    shape = small_shape(hidden_size=64, intermediate_size=128, head_dim=16)
    model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    base, place = tmp_path / "base", tmp_path / "vector"
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    shapes = matrix_shapes(canonical_modules(model)).items()
    deltas = {
        name: LowRankDelta(0.1 * torch.randn(2, inner), 0.1 * torch.randn(outer, 2))
        for name, (outer, inner) in shapes
        if ".layers.0." not in name and ".layers." in name and can_be_changed(name)
    }
    vector = make_vector(model, tokenizer, deltas)
    assert any("experts" in name for name in vector.deltas)
    vector.save_pretrained(place)
    lora = LoraConfig(**LORA | {"target_modules": ["q_proj", "v_proj"]})
    callback = SafeGeneCallback(config(vector=str(place)))
    model = quantised(base, 4)
    trainer = sft(tmp_path / "out", [callback], tokenizer, model=model, peft_config=lora)
    trainer.train()
    report = callback.report
    assert report["status"] == "safeguarded" and report["shipped"]["exact_tensors"]
    assert any("experts" in name and value for name, value in report["coefficients"].items())
