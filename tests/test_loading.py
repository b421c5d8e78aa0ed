"""Damaged checkpoints and adapters end in one sentence, whichever library reads them."""

import json

import pytest

from safegene_trl.errors import SafeGeneError
from safegene_trl.loading import load_model, load_skeleton

from .conftest import make_model, with_lora


@pytest.fixture
def adapter(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **changes):
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))


@pytest.mark.parametrize("load", [load_model, load_skeleton])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "adapter_model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: truncate(folder / "adapter_config.json"), "damaged: save the adapter again"),
        (lambda folder: edit(folder / "adapter_config.json", base_model_name_or_path="left out"), "damaged"),
        (lambda folder: edit(folder / "adapter_config.json", base_model_name_or_path=None), "names no base model"),
        (lambda folder: edit(folder / "adapter_config.json", r=3), "cannot be loaded"),
    ],
)
def test_damaged_adapter(load, damage, message, adapter):
    damage(adapter)
    with pytest.raises(SafeGeneError, match=message):
        load(str(adapter))


def test_damaged_checkpoint(adapter):
    truncate(adapter.parent / "base" / "model.safetensors")
    with pytest.raises(SafeGeneError, match=r"base.*truncated or damaged"):
        load_model(str(adapter))
