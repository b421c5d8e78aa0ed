"""The share of two models' difference that a vector's modules hold, against the whole difference."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import CheckpointError, FamilyError
from safegene_trl.extraction.coverage import Coverage, adapter_coverage
from safegene_trl.extraction.delta import adapter_delta, stored_difference

from ..conftest import make_model, with_lora


def stored(model, folder):
    model.save_pretrained(folder)
    return StoredModel.open(str(folder))


def stored_adapter(model, base, folder):
    model.peft_config["default"].base_model_name_or_path = str(base)
    return stored(model, folder)


def expected(aligned, degraded, covered):
    """From whole models in memory."""
    other = dict(degraded.named_parameters())
    squares = {
        name: float((tensor - other[name]).double().square().sum())
        for name, tensor in aligned.named_parameters()
    }
    whole = sum(squares.values())
    return sum(value for name, value in squares.items() if covered(name)) / whole


@torch.no_grad()
def moved(model, names, std=0.1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def test_of_stored_models(tmp_path):
    names = ["embed_tokens", "norm", "q_proj", "down_proj"]
    aligned, degraded = make_model(tied=False), moved(make_model(tied=False), names)
    found, coverage = stored_difference(
        stored(aligned, tmp_path / "a"), stored(degraded, tmp_path / "d"), rank=2
    )
    share = expected(aligned, degraded, lambda name: "_proj" in name)
    assert coverage.share == pytest.approx(share, rel=1e-4) and 0.1 < share < 0.9
    assert set(coverage.left_out) == {
        name for name, _ in aligned.named_parameters() if "embed" in name or "norm" in name
    }
    name = "model.layers.1.mlp.down_proj"
    change = aligned.get_submodule(name).weight - degraded.get_submodule(name).weight
    assert found[name].squares == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_of_a_mixture_of_experts(tmp_path):
    def mixture():
        torch.manual_seed(0)
        shape = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
        }
        return MixtralForCausalLM(
            MixtralConfig(
                **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
            )
        )

    aligned, degraded = mixture(), moved(mixture(), ["experts", "q_proj"])
    a, d = stored(aligned, tmp_path / "a"), stored(degraded, tmp_path / "d")
    found, coverage = stored_difference(a, d, rank=2)
    assert coverage.share == 1 and not coverage.left_out
    assert {name for name in found if "[" in name} == {
        f"model.layers.{layer}.mlp.experts.{part}[{expert}]"
        for layer in range(2)
        for part in ("gate_up_proj", "down_proj")
        for expert in range(4)
    }
    _, coverage = stored_difference(a, d, rank=2, experts=False)
    share = expected(aligned, degraded, lambda name: "q_proj" in name)
    assert coverage.share == pytest.approx(share, rel=1e-4) and 0.01 < share < 0.1
    assert len(coverage.left_out) == 2 * 4 * 3 and "experts" in coverage.check()
    assert f"{100 * share:.2g} %" in coverage.check()
    degraded = moved(mixture(), ["experts"])
    _, coverage = stored_difference(
        StoredModel.open(str(tmp_path / "a")),
        stored(degraded, tmp_path / "e"),
        rank=2,
        experts=False,
    )
    with pytest.raises(FamilyError, match=r"hold 0 % of the models' difference.*experts"):
        coverage.check()


@pytest.mark.parametrize(
    "with_base", [False, True], ids=["LoRA", "LoRA and the base weight it is on"]
)
def test_of_adapters(with_base, tmp_path):
    """A LoRA on the head and a module that is saved whole count as left out, each of them once."""
    base = make_model(tied=False)
    plain = stored(base, tmp_path / "base")
    adapted = with_lora(
        make_model(tied=False),
        modules_to_save=["embed_tokens"],
        target_modules=["q_proj", "lm_head"],
    )
    with torch.no_grad():
        adapted.get_base_model().model.embed_tokens.modules_to_save["default"].weight.add_(0.01)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=with_base)
    adapter = StoredModel.open(str(tmp_path / "adapter"))
    found = adapter_delta(plain.model, adapter.model)
    coverage = adapter_coverage(plain, adapter, found)
    merged = adapted.merge_and_unload()
    share = expected(base, merged, lambda name: "q_proj" in name)
    assert coverage.share == pytest.approx(share, rel=1e-3) and 0.05 < share < 0.95
    assert set(coverage.left_out) == {
        "lm_head.weight" if with_base else "lm_head",
        "model.embed_tokens.weight",
    }


def test_adapters_on_the_layers_alone_hold_everything(tmp_path):
    plain = stored(make_model(), tmp_path / "base")
    adapter = stored_adapter(with_lora(make_model()), tmp_path / "base", tmp_path / "adapter")
    coverage = adapter_coverage(plain, adapter, adapter_delta(plain.model, adapter.model))
    assert coverage.share == 1 and coverage.check() is None and coverage.whole > 0


def test_a_layer_that_is_saved_whole_is_part_of_the_difference(tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    adapted = with_lora(make_model(), target_modules=["q_proj"], modules_to_save=["down_proj"])
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        adapted.get_base_model().get_submodule(name).modules_to_save["default"].weight.add_(0.5)
    adapter = stored_adapter(adapted, tmp_path / "base", tmp_path / "adapter")
    # so that its factors alone are not taken for the difference
    assert adapter.has_full_rank_changes
    found, _ = stored_difference(
        StoredModel.open(str(tmp_path / "base")), adapter, rank=2, exact=True
    )
    torch.testing.assert_close(
        found[name].delta.dense(), torch.full((32, 48), -0.5), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("side", ["aligned", "degraded"])
def test_a_diverged_model_is_named(name, side, tmp_path):
    models = {"aligned": make_model(), "degraded": moved(make_model(), ["q_proj"])}
    with torch.no_grad():
        models[side].get_parameter(name).view(-1)[3] = float("nan")
    pair = [stored(model, tmp_path / which) for which, model in models.items()]
    with pytest.raises(
        CheckpointError, match=rf"`{name.removesuffix('.weight')}.*{side} holds NaN or infinity"
    ):
        stored_difference(*pair, rank=2)


def test_a_diverged_adapter_is_named():
    model = with_lora(make_model())
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[2, 1] = float(
            "inf"
        )
    with pytest.raises(
        CheckpointError, match=r"A LoRA on `model.layers.1.mlp.up_proj` holds NaN or infinity"
    ):
        adapter_delta(make_model(), model)


def test_limits():
    assert Coverage(0.0, {}).share == 1
    assert Coverage(1.0, {"a": 1.0}).check() is None
    assert Coverage(1.0, {"a": 0.5, "b": 2.0}).check().count("`b`, `a`") == 1
    assert Coverage(0.011, {"a": 1.0}).check() and Coverage(
        0.011, {"a": 1.0}
    ).share == pytest.approx(0.0109, abs=1e-4)
    with pytest.raises(FamilyError, match="`a`"):
        Coverage(0.009, {"a": 1.0}).check()
