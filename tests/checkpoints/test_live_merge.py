"""Merged checkpoints give the hooked model's logits."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safegene_trl.checkpoints.atomic_writes import atomic_directory
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.contents import MARKER
from safegene_trl.checkpoints.live_merge import merged_tensor, save_merged
from safegene_trl.checkpoints.merge_terms import NO_VECTOR, ScaledVector
from safegene_trl.checkpoints.preflight import check_output
from safegene_trl.errors import OutputError
from safegene_trl.models.parameters import canonical_parameters

from ..conftest import ALONE, attachment_of, make_deltas, make_model, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


def hooked_logits(model, deltas, coefficients):
    attachment = attachment_of(model, deltas, "module")
    with torch.no_grad(), attachment.applied(attachment.space.values(coefficients)):
        return model(IDS).logits


def random_coefficients(deltas):
    return {name: 0.2 + 0.1 * position for position, name in enumerate(deltas)}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_merged_checkpoint_equals_hooked_model(kind, tied, lora, tokenizer, tmp_path):
    model = make_model(kind, tied)
    deltas = make_deltas(model)
    if lora:
        model = with_lora(model)
    coefficients = random_coefficients(deltas)
    expected = hooked_logits(model, deltas, coefficients)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_merged(
        model,
        ScaledVector(deltas, coefficients),
        CheckpointFolder(tmp_path, tokenizer, "5GB"),
        ALONE,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.chat_template == tokenizer.chat_template
    assert tokenizer.get_vocab().items() <= reloaded.get_vocab().items()
    assert (tmp_path / "generation_config.json").is_file()


def test_sharded_checkpoint_equals_single_file(tokenizer, tmp_path):
    model = with_lora(make_model(tied=False))
    deltas = make_deltas(make_model())
    coefficients = random_coefficients(deltas)
    save_merged(
        model,
        ScaledVector(deltas, coefficients),
        CheckpointFolder(tmp_path, tokenizer, "20KB"),
        ALONE,
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        merged(IDS).logits, hooked_logits(model, deltas, coefficients), atol=1e-5, rtol=1e-5
    )


def test_bfloat16_is_rounded_once(tokenizer, tmp_path):
    model = with_lora(make_model()).to(torch.bfloat16)
    deltas = make_deltas(make_model())
    name = "model.layers.1.self_attn.q_proj"
    save_merged(
        model,
        ScaledVector(deltas, dict.fromkeys(deltas, 0.37)),
        CheckpointFolder(tmp_path, tokenizer, "5GB"),
        ALONE,
    )
    layer = model.get_base_model().get_submodule(name)
    task = (
        layer.lora_B["default"].weight.float()
        @ layer.lora_A["default"].weight.float()
        * layer.scaling["default"]
    )
    exact = layer.base_layer.weight.float() + task + 0.37 * deltas[name].dense()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert merged.dtype == torch.bfloat16
    close = merged.get_submodule(name).weight == exact.to(torch.bfloat16)
    assert close.float().mean() > 0.999  # the order of two float32 additions may flip a tie


def test_checkpoint_loads_without_this_package(tokenizer, tmp_path):
    model = make_model()
    deltas = make_deltas(model)
    save_merged(
        model,
        ScaledVector(deltas, random_coefficients(deltas)),
        CheckpointFolder(tmp_path, tokenizer, "5GB"),
        ALONE,
    )
    script = (
        "import sys; sys.modules['safegene_trl'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(float(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.norm.weight.sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(run.stdout) == pytest.approx(32.0)


def test_a_tensor_that_is_not_finite_is_not_merged(tokenizer, tmp_path):
    """Neither the vector's modules nor any sample need touch it."""
    model = make_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] = float("nan")
    deltas, merged, plain = make_deltas(model), tmp_path / "merged", tmp_path / "plain"
    merged.mkdir()
    plain.mkdir()
    with pytest.raises(OutputError, match="not finite, so nothing is written"):
        save_merged(
            model,
            ScaledVector(deltas, random_coefficients(deltas)),
            CheckpointFolder(merged, tokenizer, "5GB"),
            ALONE,
        )
    # a plain fine-tune is kept as it is
    save_merged(model, NO_VECTOR, CheckpointFolder(plain, tokenizer, "5GB"), ALONE)
    assert (plain / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(tmp_path):
    target = tmp_path / "safeguarded"
    with pytest.raises(OutputError, match="free space"), atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whoever_may_enter_the_folder_can_read_the_weights(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "out") as folder:
            save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 2 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_any_error_leaves_the_earlier_checkpoint(tmp_path):
    target = tmp_path / "safeguarded"
    with atomic_directory(target) as folder:
        (folder / MARKER).write_text("{}")
    with pytest.raises(KeyError), atomic_directory(target) as folder:
        (folder / MARKER).write_text("new")
        raise KeyError("any")
    assert (target / MARKER).read_text() == "{}"
    with atomic_directory(target) as folder:
        (folder / MARKER).write_text("new")
    assert (target / MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["safeguarded"]


def test_foreign_output_is_never_replaced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    check_output(target)
    (target / "model.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="did not write"):
        check_output(target)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_output(file)


def test_too_little_space_is_seen_early(tmp_path):
    with pytest.raises(OutputError, match="GiB free"):
        check_output(tmp_path / "out", needed_bytes=2**60)


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_products_are_float32_whatever_the_trainer_allows(before, monkeypatch):
    backend = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("an older torch has the switch `allow_tf32`")
    seen, own = [], backend.fp32_precision
    monkeypatch.setattr(
        "safegene_trl.checkpoints.live_merge.add_terms",
        lambda *args: seen.append(backend.fp32_precision),
    )
    try:
        backend.fp32_precision = before
        model = make_model()
        weight = next(
            p for p in canonical_parameters(model) if p.name.endswith("1.mlp.down_proj.weight")
        )
        merged_tensor(
            weight, ScaledVector(make_deltas(model), dict.fromkeys(make_deltas(model), 1.0)), ALONE
        )
        assert seen and set(seen) == {"ieee"} and backend.fp32_precision == before
    finally:
        backend.fp32_precision = own


@pytest.mark.parametrize("lora", [True, False])
def test_the_config_names_the_class_of_a_model_that_was_built_from_a_config(
    lora, tokenizer, tmp_path
):
    model = with_lora(make_model()) if lora else make_model()
    base = model.get_base_model() if lora else model
    assert base.config.architectures is None
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert base.config.architectures is None  # the live model stays as it is


@pytest.mark.parametrize("says", [None, torch.bfloat16])
@pytest.mark.parametrize("holds", [torch.float32, torch.float16])
def test_the_config_names_the_type_of_the_files(holds, says, tokenizer, tmp_path):
    """A trainer may have changed the type since the model was loaded, as FSDP2's does."""
    model = make_model().to(holds)
    model.config.dtype = says
    model.model.norm.to(torch.float32)  # as some architectures keep their norms
    save_merged(model, NO_VECTOR, CheckpointFolder(tmp_path, tokenizer, "5GB"), ALONE)
    named = json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert named == str(holds).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == holds
    assert model.config.dtype == says  # the live model stays as it is
