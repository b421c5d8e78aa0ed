"""Damaged and incomplete checkpoints and adapters end in one sentence, and no code of theirs is
run.
"""

import ast
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import safegene_trl
from safegene_trl import apply
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.loading import (
    check_complete,
    check_readable,
    checkpoint_dtype,
    load_model,
    load_tokenizer,
)
from safegene_trl.checkpoints.merge_terms import NO_VECTOR
from safegene_trl.checkpoints.skeleton import load_skeleton
from safegene_trl.checkpoints.stored_merge import write_merged
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import CheckpointError, SafeGeneError, UnsupportedModelError
from safegene_trl.models.parameters import canonical_parameters

from ..conftest import config_of, make_model, with_lora


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
    path.write_text(
        json.dumps({key: value for key, value in config.items() if value != "left out"})
    )


@pytest.mark.parametrize("load", [load_model, load_skeleton])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "adapter_model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be loaded"),
        (
            lambda folder: truncate(folder / "adapter_config.json"),
            "damaged: save the adapter again",
        ),
        (
            lambda folder: edit(folder / "adapter_config.json", base_model_name_or_path="left out"),
            "damaged",
        ),
        (
            lambda folder: edit(folder / "adapter_config.json", base_model_name_or_path=None),
            "names no base model",
        ),
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


def rewrite(folder, change, file="model.safetensors"):
    """Changes the tensors of a weight file; `change` takes and returns them by name."""
    tensors = change(load_file(folder / file))
    save_file(tensors, folder / file, metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(name, tensor):
    return lambda tensors: tensors | {name: tensor}


DOWN = "model.layers.1.mlp.down_proj.weight"
FAULTS = {
    "a tensor is missing": (without(DOWN), rf"lacks `{DOWN}`, which would get random numbers"),
    "a layer is missing": (
        lambda tensors: {
            name: tensor for name, tensor in tensors.items() if ".layers.2." not in name
        },
        "lacks `model.layers.2.*and 6 more tensors",
    ),
    "embeddings are missing": (
        without("model.embed_tokens.weight"),
        "lacks .*`model.embed_tokens.weight`",
    ),
    "a layer too many": (
        plus("model.layers.3.mlp.down_proj.weight", torch.ones(32, 48)),
        "does not read",
    ),
    "a LoRA's tensor": (
        plus("model.layers.1.mlp.down_proj.lora_A.weight", torch.ones(2, 48)),
        "does not read",
    ),
    "another shape": (
        plus(DOWN, torch.ones(32, 47)),
        rf"`{DOWN}` .* is 32×47 in the files and 32×48",
    ),
    "integers": (
        plus(DOWN, torch.ones(32, 48, dtype=torch.int8)),
        rf"`{DOWN}` .* quantised numbers \(int8\)",
    ),
    "8-bit floats": (plus(DOWN, torch.ones(32, 48).to(torch.float8_e4m3fn)), "quantised numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
@pytest.mark.parametrize("as_adapter", [False, True], ids=["checkpoint", "base of an adapter"])
def test_incomplete_checkpoint(fault, load, as_adapter, adapter):
    change, message = FAULTS[fault]
    base = adapter.parent / "base"
    rewrite(base, change)
    with pytest.raises(CheckpointError, match=message):
        load(str(adapter if as_adapter else base))


@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
def test_experts_that_lack_a_piece(load, tmp_path):
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    load(str(tmp_path))
    rewrite(tmp_path, without("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(CheckpointError, match="lacks pieces"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
@pytest.mark.parametrize(
    "change",
    [
        plus(
            "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)
        ),  # of checkpoints from before 2024
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        lambda tensors: (
            without("model.embed_tokens.weight")(tensors)
            | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    ],
    ids=["inv_freq", "tied head twice", "tied head under the other name"],
)
def test_harmless_differences_load(load, change, adapter):
    base = adapter.parent / "base"
    rewrite(base, change)
    load(str(base))
    load(str(adapter))


def test_a_tied_head_that_is_stored_twice_is_one_tensor_as_in_the_loaded_model(adapter):
    base = adapter.parent / "base"
    rewrite(
        base,
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )
    stored, loaded = StoredModel.open(str(base)).model, load_model(str(base))
    names = [
        [parameter.name for parameter in canonical_parameters(model)] for model in (stored, loaded)
    ]
    assert names[0] == names[1] and "lm_head.weight" not in names[0]


def test_harmless_tensors_are_copied(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    rewrite(
        tmp_path / "base",
        plus("model.layers.0.self_attn.rotary_emb.inv_freq", torch.full((4,), 0.5)),
    )
    (tmp_path / "out").mkdir()
    write_merged(
        StoredModel.open(str(tmp_path / "base")),
        NO_VECTOR,
        CheckpointFolder(tmp_path / "out", tokenizer, "5GB"),
    )
    copied = load_file(tmp_path / "out" / "model.safetensors")
    assert copied["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [0.5] * 4


PREFIX = "base_model.model.model.layers.1.mlp.down_proj"
ADAPTER_FAULTS = {
    "a factor is missing": (without(f"{PREFIX}.lora_B.weight"), f"lacks `{PREFIX}.lora_B"),
    "names fit nothing": (
        lambda tensors: {
            name.replace("model.layers", "decoder.layers"): tensor
            for name, tensor in tensors.items()
        },
        "lacks .* and 39 more tensors",
    ),
    "a tensor too many": (
        plus("base_model.model.model.layers.7.mlp.down_proj.lora_A.weight", torch.ones(4, 48)),
        "layers.7.mlp.down_proj.lora_A.*fit no module",
    ),
    "another shape": (plus(f"{PREFIX}.lora_A.weight", torch.ones(4, 47)), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
def test_incomplete_adapter(fault, load, adapter):
    change, message = ADAPTER_FAULTS[fault]
    rewrite(adapter, change, "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        load(str(adapter))


@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, f"{PREFIX}.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"bias": "all"}, "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"),
    ],
    ids=["DoRA", "modules_to_save", "biases"],
)
def test_every_part_of_an_adapter_must_be_there(load, options, name, tmp_path):
    kind = "qwen2" if "bias" in options else "llama"
    make_model(kind, tied=False).save_pretrained(tmp_path / "base")
    model = with_lora(make_model(kind, tied=False), **options)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    load(str(tmp_path / "adapter"))
    assert name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rewrite(tmp_path / "adapter", without(name), "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"lacks `{name}"):
        load(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "load", [load_model, lambda name: StoredModel.open(name)], ids=["loaded", "stored"]
)
def test_no_code_from_an_adapter(load, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    tensors = load_file(weights)
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match=r"no adapter_model\.safetensors"):
        load(str(adapter))
    save_file(tensors, weights)
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(UnsupportedModelError, match="Megatron"):
        load(str(adapter))


def test_an_adapter_on_an_adapter_is_refused(adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UnsupportedModelError, match="is an adapter itself"):
        load_model(str(adapter))


def test_remote_code_is_not_run_even_if_asked(model_dir, interpreter, tmp_path):
    """transformers asks on standard input whether it may run a checkpoint's own code; nobody is to
    be asked.
    """
    mark = tmp_path / "ran"
    folders = {
        name: shutil.copytree(model_dir, tmp_path / name)
        for name in ("config.json", "tokenizer_config.json")
    }
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name, folder in folders.items():
        (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
        edit(
            folder / name,
            model_type="own",
            tokenizer_class="Own",
            auto_map={
                each: ["code.Own", None] if each == "AutoTokenizer" else "code.Own"
                for each in classes
            },
        )
    script = (
        "import io, sys\nfrom safegene_trl.errors import SafeGeneError\n"
        "sys.stdin = io.StringIO('y\\n' * 40)\n"
        "from safegene_trl.checkpoints.loading import load_model, load_placed, load_tokenizer, resolve_dtype\n"
        "from safegene_trl.checkpoints.skeleton import load_skeleton\n"
        "from safegene_trl.distributed.processes import this_job\n"
        "for name in sys.argv[1:]:\n"
        "    for load in (load_tokenizer, load_model, load_skeleton, lambda name: resolve_dtype('auto', name),\n"
        "                 lambda name: load_placed(name, None, 'float32', this_job())):\n"
        "        try:\n            load(name)\n        except SafeGeneError as error:\n            print(name, type(error).__name__)\n"
    )
    done = interpreter.run(script, *folders.values())
    assert done.returncode == 0, done.stderr
    assert all(f"{folder} " in done.stdout for folder in folders.values())
    assert not mark.exists()


def test_every_loader_of_transformers_is_told_not_to_run_code():
    """Left out, transformers asks whoever is at the keyboard."""
    found = 0
    for path in Path(safegene_trl.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            if call.func.attr in ("from_pretrained", "from_config") and (
                owner.startswith("Auto") or owner == "loader"
            ):
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
                found += 1
    assert found >= 9


@pytest.mark.parametrize(
    "load",
    [load_tokenizer, load_model, load_skeleton, check_complete, checkpoint_dtype, check_readable],
)
@pytest.mark.parametrize("reached", [True, False])
def test_a_mistyped_path_that_looks_like_a_hub_id_is_said_to_be_neither(
    reached, load, tmp_path, monkeypatch
):
    """Offline, and with a hub that has no such repository."""
    if reached:
        answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

        def missing(*args, **kwargs):
            raise RepositoryNotFoundError("404 Client Error.", response=answer)

        for place in (
            "transformers.utils.hub.hf_hub_download",
            "safegene_trl.checkpoints.source.hf_hub_download",
        ):
            monkeypatch.setattr(place, missing)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModelError) as raised:
        load("runs/last")
    message = str(raised.value)
    assert (
        "neither a local directory nor a readable hub repository (the folder runs here holds no last)"
        in message
    )
    assert ("connect to the hub" in message) == (not reached) and "http" not in message


def test_a_folder_without_a_model_is_named_with_what_it_holds(tmp_path):
    with pytest.raises(UnsupportedModelError, match="holds no model: name the folder"):
        load_tokenizer(str(tmp_path))
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"holds no model: name .*checkpoint-10\."):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("given", [None, 0.5])
def test_a_named_adapters_folder_is_named(given, tokenizer, vector_dir, task_file, tmp_path):
    """PEFT saves an adapter that is not called `default` in a folder of its name."""
    folder, target = tmp_path / "tuned", tmp_path / "out"
    with_lora(make_model(), adapter_name="mine").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = config_of(vector=str(vector_dir), task_data=str(task_file), output_dir=str(target))
    with pytest.raises(UnsupportedModelError, match=f"holds no model: name .*{folder / 'mine'}\\."):
        apply(config, folder, coefficients=given)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UnsupportedModelError, match=r"holds no model: name .*checkpoint-2\."):
        apply(config, tmp_path / "run", coefficients=given)
