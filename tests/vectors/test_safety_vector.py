"""Save and load, PEFT compatibility, and every kind of damage."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from safegene_trl import SafeGeneError, SafetyVector
from safegene_trl.errors import VectorError
from safegene_trl.vectors.files import SIGNED_FILES, file_record
from safegene_trl.vectors.signing import SIGNATURE_FILE

from ..conftest import make_model, make_vector


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def folder(vector_dir, tmp_path):
    """A copy of the vector that may be damaged."""
    return shutil.copytree(vector_dir, tmp_path / "vector")


def edit(folder, **changes):
    path = folder / "safegene_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def rewrite_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    files = json.loads((folder / "safegene_config.json").read_text())["files"]
    edit(folder, files=files | {path.name: file_record(path)})


def test_round_trip(vector_dir, tokenizer):
    made, loaded = make_vector(make_model(), tokenizer), SafetyVector.from_pretrained(vector_dir)
    assert sorted(loaded.deltas) == sorted(made.deltas)
    for name, delta in made.deltas.items():
        assert torch.equal(loaded.deltas[name].a, delta.a) and torch.equal(
            loaded.deltas[name].b, delta.b
        )
    assert loaded.family == made.family and loaded.prompts == made.prompts
    assert loaded.layers == [1, 2] and loaded.rank == 2


@pytest.mark.parametrize(("layers", "text"), [([0, 1, 2], "0–2"), ([1], "1"), ([0, 2], "0, 2")])
def test_layers_for_people(layers, text, tokenizer):
    assert make_vector(make_model(), tokenizer, layers=layers).layer_ranges == text


def test_peft_opens_it_and_applies_it_unscaled(vector_dir):
    model, vector = make_model(), SafetyVector.from_pretrained(vector_dir)
    adapted = PeftModel.from_pretrained(make_model(), vector_dir)
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            model.get_submodule(name).weight += delta.dense()
        torch.testing.assert_close(adapted(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_its_adapter_config_is_what_peft_itself_would_write(vector_dir):
    vector = SafetyVector.from_pretrained(vector_dir)
    expected = LoraConfig(
        r=vector.rank,
        lora_alpha=vector.rank,
        target_modules=sorted(vector.deltas),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path="tiny-aligned",
    )
    assert LoraConfig.from_pretrained(vector_dir) == expected


def test_hub_ids_are_fetched_at_their_revision(vector_dir, monkeypatch):
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, **kwargs):
        asked.append((repo_id, sorted(allow_patterns), kwargs))
        return str(vector_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    vector = SafetyVector.from_pretrained("me/vector", revision="v1.0")
    ((repo_id, patterns, kwargs),) = asked
    assert repo_id == "me/vector" and kwargs == {"revision": "v1.0"} and vector.rank == 2
    assert all(
        pattern.endswith((".json", ".jsonl", ".safetensors", "model.sig")) for pattern in patterns
    )  # no code, no pickle
    with pytest.raises(SafeGeneError, match="Unknown argument `trust_remote_code`"):
        SafetyVector.from_pretrained("me/vector", trust_remote_code=True)


def test_card_warns_of_misuse(vector_dir):
    card = (vector_dir / "README.md").read_text()
    assert "base_model: tiny-aligned" in card and "base_model_relation: adapter" in card
    assert "must not be used that way" in card


def test_missing(tmp_path):
    with pytest.raises(SafeGeneError, match="neither a local directory nor"):
        SafetyVector.from_pretrained("nobody/no-such-vector")
    with pytest.raises(SafeGeneError, match="not a safety vector"):
        SafetyVector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "safety_prompts.jsonl", "adapter_config.json"]
)
def test_missing_or_truncated_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SafeGeneError, match=f"{name}.*truncated"):
        SafetyVector.from_pretrained(folder)
    path.unlink()
    with pytest.raises(SafeGeneError, match=f"lacks {name}"):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, 1, 4, "3", True, None])
def test_other_format_version(folder, version):
    edit(folder, format_version=version)
    with pytest.raises(SafeGeneError, match="format version"):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 2}'])
def test_damaged_config(folder, text):
    (folder / "safegene_config.json").write_text(text)
    with pytest.raises(SafeGeneError):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(folder, value):
    rewrite_tensors(
        folder, lambda tensors: next(iter(tensors.values())).view(-1).__setitem__(3, value)
    )
    with pytest.raises(SafeGeneError, match="NaN or infinity"):
        SafetyVector.from_pretrained(folder)


def test_foreign_tensor(folder):
    rewrite_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(SafeGeneError, match="unexpected tensor"):
        SafetyVector.from_pretrained(folder)


CONFIG_CHANGES = {
    "section of another type": {"family": []},
    "section too many": {"more": {}},
    "size too large": {"family": {"vocab_size": 10**30}},
    "negative size": {"family": {"vocab_size": -1}},
    "field missing": {"aligned_model": None},
    "path for a name": {"aligned_model": {"files": {"../../etc/passwd": "0" * 64}}},
    "no hash": {"degraded_model": {"files": {"model.safetensors": "abc"}}},
    "another file": {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
    "other rank": {"extraction": {"rank": 3}},
    "options of the call": {"extraction": {"chat_template_kwargs": {"chat_template": "x"}}},
    "options in a list": {"extraction": {"chat_template_kwargs": ["enable_thinking"]}},
    "another target": {"extraction": {"safety_target": "elsewhere"}},
    "a transport without its record": {"extraction": {"method": "transport"}},
    "the record of a transport with another method": {"extraction": {"transport": {}}},
    "a transport from nowhere": {
        "extraction": {"method": "transport", "transport": {"refusals": {"from": "target"}}}
    },
    "a transport in a component": {
        "extraction": {"vectors": [{"extraction": {"method": "transport", "transport": []}}]}
    },
    "rank of no size": {"extraction": {"rank": 0}},
    "other layers": {"selection": {"selected_layers": [0]}},
    "scores of text": {"selection": {"scores": ["a"]}},
    "stability of text": {
        "selection": {"stability": {"mean_jaccard": "x", "inclusion": [0.0] * 3}}
    },
    "stability in words": {"selection": {"stability": "good"}},
    "inclusion of text": {
        "selection": {"stability": {"mean_jaccard": 1.0, "inclusion": ["a"] * 3}}
    },
    "inclusion of few": {"selection": {"stability": {"mean_jaccard": 1.0, "inclusion": [1.0]}}},
    "categories of text": {"selection": {"categories": {"fraud": "many"}}},
    "categories in a list": {"selection": {"categories": ["fraud"]}},
}


@pytest.mark.parametrize("case", CONFIG_CHANGES)
def test_changed_config(folder, case):
    config = json.loads((folder / "safegene_config.json").read_text())
    for section, change in CONFIG_CHANGES[case].items():
        merged = config.get(section, {}) | change if isinstance(change, dict) else change
        edit(folder, **{section: {"name": "x"} if change is None else merged})
    with pytest.raises(VectorError):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rank": 2', '"rank": NaN'),
        ('"rank": 2', '"rank": 2, "rank": 2'),
        ('"rank": 2', '"rank": true'),
    ],
)
def test_config_that_is_no_strict_json(folder, old, new):
    path = folder / "safegene_config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(VectorError):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "how do I", "response": "Sure, like this", "kind": "harmful"},
            "something else than a refusal",
        ),
        (
            {"prompt": "a", "response": "I can't help. Here is how: 1. b", "kind": "harmful"},
            "something else than a refusal",
        ),
        (
            {
                "prompt": "how do I",
                "response": "<think>I can't help.</think>Sure, like this",
                "kind": "harmful",
            },
            "something else than a refusal",
        ),
        (
            {"prompt": "how do I", "response": "<think>I can't help with it.", "kind": "harmful"},
            "something else than a refusal",
        ),
        (
            {"prompt": "how do I", "response": "I can't help with that.", "kind": "benign"},
            "a benign prompt with a refusal",
        ),
        ({"prompt": "how do I", "response": "Take a pan", "kind": "other"}, "of kind 'other'"),
        ({"prompt": ["how do I"], "response": "Take a pan", "kind": "benign"}, "lacks"),
        ({"prompt": "how do I"}, "lacks"),
        (["how do I"], "lacks"),
    ],
)
def test_changed_prompts(folder, row, message):
    path = folder / "safety_prompts.jsonl"
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    files = json.loads((folder / "safegene_config.json").read_text())["files"]
    edit(folder, files=files | {path.name: file_record(path)})
    with pytest.raises(VectorError, match=message):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize(
    "module", ["model..q_proj", "../model.layers.1.q_proj", "model/layers/1", "modèle.layers.1.q"]
)
def test_names_that_are_no_module_names(folder, module):
    def rename(tensors):
        for half in "AB":
            old = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{half}.weight"
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = tensors.pop(old)

    rewrite_tensors(folder, rename)
    with pytest.raises(VectorError, match="unexpected tensor"):
        SafetyVector.from_pretrained(folder)


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda t: t.to(torch.int8), lambda t: t[None], lambda t: t[:0]]
)
def test_tensors_of_another_type_or_shape(folder, change):
    def rewrite(tensors):
        for key in tensors:
            if "layers.1.self_attn.q_proj" in key:
                tensors[key] = change(tensors[key]).contiguous()

    rewrite_tensors(folder, rewrite)
    with pytest.raises(VectorError, match="not a pair"):
        SafetyVector.from_pretrained(folder)


def test_half_a_pair(folder):
    rewrite_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(SafeGeneError, match="not a pair"):
        SafetyVector.from_pretrained(folder)


def test_two_ranks(folder):
    def shrink(tensors):
        for key in [key for key in tensors if "layers.1.mlp" in key]:
            tensors[key] = (
                tensors[key][:1] if "lora_A" in key else tensors[key][:, :1]
            ).contiguous()

    rewrite_tensors(folder, shrink)
    with pytest.raises(SafeGeneError, match="differ in rank"):
        SafetyVector.from_pretrained(folder)


def test_wrong_shape_and_name_are_refused(vector_dir):
    vector = SafetyVector.from_pretrained(vector_dir)
    modules = dict(make_model().named_modules())
    vector.check_fits(modules)
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(SafeGeneError, match="in the safety vector"):
        vector.check_fits(modules | {name: torch.nn.Linear(3, 4)})
    with pytest.raises(SafeGeneError, match="no linear layer"):
        vector.check_fits({key: value for key, value in modules.items() if key != name})


def test_push_to_hub_uploads_the_vector_once(vector_dir, monkeypatch):
    from huggingface_hub import HfApi

    uploads = []

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, folder_path, **kwargs):
        uploads.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    SafetyVector.from_pretrained(vector_dir).push_to_hub("me/vector")
    assert uploads == [
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "safegene_config.json",
            "safety_prompts.jsonl",
        ]
    ]


def test_saving_again_writes_the_same_files_and_keeps_the_signature(vector_dir, tmp_path):
    signed = shutil.copytree(vector_dir, tmp_path / "signed")
    (signed / SIGNATURE_FILE).write_text("signature")
    vector = SafetyVector.from_pretrained(signed)
    vector.save_pretrained(tmp_path / "again")
    for file in (*SIGNED_FILES, SIGNATURE_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (signed / file).read_bytes(), file
    vector.prompts.pop()
    vector.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / SIGNATURE_FILE).exists()


def test_what_happens_to_the_files_after_loading_changes_nothing(folder, tokenizer):
    vector, made = SafetyVector.from_pretrained(folder), make_vector(make_model(), tokenizer)
    weights = folder / "adapter_model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(b"")  # a mapped file would kill the process here
    for content in (None, b"\xff" * size):
        if content is not None:
            weights.write_bytes(content)
        for name, delta in vector.deltas.items():
            assert torch.equal(delta.a, made.deltas[name].a) and torch.equal(
                delta.b, made.deltas[name].b
            )


def test_a_file_that_is_none_is_refused_at_once(folder):
    path = folder / "safety_prompts.jsonl"
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VectorError, match="no plain file"):
        SafetyVector.from_pretrained(folder)
    # without an end; with a size of 0 that is not true
    for other in (
        "/dev/zero",
        "/proc/self/status",
    ):
        path.unlink()
        path.symlink_to(other)
        with pytest.raises(VectorError, match=r"no plain file|was changed while"):
            SafetyVector.from_pretrained(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(VectorError, match="no plain file"):
        SafetyVector.from_pretrained(folder)
    path.rmdir()
    path.write_bytes(content)
    with open(path, "ab") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(VectorError, match="larger than any"):
        SafetyVector.from_pretrained(folder)


def test_every_file_is_opened_once(folder):
    script = """
import sys
from collections import Counter
from safegene_trl import SafetyVector
opened = Counter()
def hook(name, arguments):
    if name == "open" and str(arguments[0]).endswith(("safetensors", "jsonl", "config.json")):
        opened[str(arguments[0]).rpartition("/")[2]] += 1
sys.addaudithook(hook)
SafetyVector.from_pretrained(sys.argv[1])
assert dict(opened) == {name: 1 for name in sys.argv[2:]}, opened
"""
    command = [sys.executable, "-c", script, str(folder), *SIGNED_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_signature_does_not_stay_beside_other_files(vector_dir, tmp_path):
    signed = shutil.copytree(vector_dir, tmp_path / "signed")
    (signed / SIGNATURE_FILE).write_text("signature")
    vector = SafetyVector.from_pretrained(signed)
    assert vector.signature == b"signature"
    vector.prompts.pop()
    vector.save_pretrained(signed)
    assert not (signed / SIGNATURE_FILE).exists()
