"""Every shipped recipe parses, and runs up to the first training step on a tiny model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from safegene_trl import SafetyVector
from safegene_trl.callback import DryRunComplete
from safegene_trl.commands.main import main
from safegene_trl.commands.parsing import parse
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.models.parameters import canonical_modules

from .conftest import BENIGN, HARMFUL, make_model, make_vector, refusing, with_lora
from .extraction.transport import planted


RECIPES = Path(__file__).parents[1] / "recipes"
FAMILIES = {
    "smollm2-135m": "llama",
    "llama-3.1-8b": "llama",
    "qwen2.5-1.5b": "qwen2",
    "qwen2.5-7b": "qwen2",
    "qwen3-4b": "qwen3",
    "glm-4-9b": "glm4",
    "mistral-7b": "mistral",
    "gemma-2-9b": "gemma2",
}
OTHERS = ("extract.yaml", "retarget.yaml", "by_category.yaml", "transport.yaml")
APPLICATIONS = sorted(RECIPES.glob("*/apply.yaml"))
TRAININGS = sorted(
    path for path in RECIPES.glob("*/*.yaml") if path.name not in (*OTHERS, "apply.yaml")
)
EXTRACTIONS = sorted(RECIPES.glob("*/extract.yaml"))
RETARGETING = RECIPES / "smollm2-135m" / "retarget.yaml"
BY_CATEGORY = RECIPES / "smollm2-135m" / "by_category.yaml"
TRANSPORT = RECIPES / "qwen2.5-1.5b" / "transport.yaml"


@pytest.fixture
def family(request, tokenizer, tmp_path):
    """A tiny model of the architecture of a recipe's family, and a vector for it: their folders."""
    model = make_model(FAMILIES[request.getfixturevalue("path").parent.name])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    # As users load it: some architectures have a tokenizer class that adds tokens of its own.
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    make_vector(model, loaded).save_pretrained(tmp_path / "vector")
    return tmp_path / "model", tmp_path / "vector"


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def test_the_recipes_are_there():
    expected = {
        f"{family}/{stage}"
        for family in FAMILIES
        for stage in ("degrade", "extract", "sft", "apply")
    }
    own = {
        f"smollm2-135m/{name}" for name in ("align", "degrade_openings", "retarget", "by_category")
    }
    own.add("qwen2.5-1.5b/transport")
    assert {name_of(path) for path in RECIPES.glob("*/*.yaml")} == expected | own
    rows = re.findall(
        r"^\| \[?`([^`]+)`\S* \| (\S+?),? ", (RECIPES / "README.md").read_text(), re.MULTILINE
    )
    listed = {family: model for family, model in rows if not family.endswith(".yaml")}
    assert set(listed) == set(FAMILIES)
    for family in set(FAMILIES) - {"smollm2-135m"}:
        recipe = yaml.safe_load((RECIPES / family / "sft.yaml").read_text())
        assert listed[family] == recipe["model_name_or_path"]


ALONE = [RETARGETING, BY_CATEGORY, TRANSPORT]


@pytest.mark.parametrize("path", [*TRAININGS, *EXTRACTIONS, *APPLICATIONS, *ALONE], ids=name_of)
def test_header_says_how_to_run_it(path):
    command = {"apply.yaml": "apply"}.get(path.name, "extract" if path.name in OTHERS else "sft")
    assert (
        f"# Run: safegene {command} --config {path.relative_to(RECIPES.parent)}" in path.read_text()
    )


@pytest.mark.parametrize("path", TRAININGS, ids=name_of)
def test_training_recipe_dry_runs(path, family, task_file, tmp_path):
    model_dir, vector_dir = family
    recipe = yaml.safe_load(path.read_text())
    recipe |= {
        "model_name_or_path": str(model_dir),
        "dtype": "float32",
        "output_dir": str(tmp_path / "out"),
    }
    recipe |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
    recipe.pop("dataset_name", None)
    recipe["datasets"] = [{"path": "json", "data_files": str(task_file), "split": "train"}]
    recipe["safegene"] = recipe.get("safegene", {}) | {"vector": str(vector_dir), "dry_run": True}
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe))
    with pytest.raises(DryRunComplete):
        main(["sft", "--config", str(edited)])
    assert not (tmp_path / "out" / "safeguarded").exists()


@pytest.mark.parametrize("path", APPLICATIONS, ids=name_of)
def test_application_recipe_dry_runs_on_the_fine_tune_of_the_training_recipe(
    path, family, task_file, tmp_path, capsys
):
    model_dir, vector_dir = family
    recipe = yaml.safe_load(path.read_text())
    training = yaml.safe_load((path.parent / "sft.yaml").read_text())
    data = training.get("dataset_name") or training["datasets"][0]["data_files"]
    assert recipe["model_name_or_path"] == training["output_dir"]
    assert recipe["safegene"]["data"].pop("task_data") == data
    place = recipe["safegene"].setdefault("output", {}).pop("output_dir")
    assert place == f"build/{path.parent.name}/safeguarded"
    # the step is the same in both
    assert {**recipe["safegene"], "output": recipe["safegene"]["output"] or None} == {
        **training["safegene"],
        "output": training["safegene"].get("output"),
    }
    tuned = with_lora(make_model(FAMILIES[path.parent.name]))
    tuned.peft_config["default"].base_model_name_or_path = str(model_dir)
    tuned.save_pretrained(tmp_path / "tuned")
    recipe |= {"model_name_or_path": str(tmp_path / "tuned"), "dtype": "float32"}
    recipe["safegene"] |= {"vector": str(vector_dir), "dry_run": True}
    recipe["safegene"]["data"]["task_data"] = str(task_file)
    recipe["safegene"]["output"]["output_dir"] = str(tmp_path / "out")
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe))
    assert main(["apply", "--config", str(edited)]) == 0
    assert "Dry run: all checks passed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", EXTRACTIONS, ids=name_of)
def test_extraction_recipe_runs(path, family, tmp_path, monkeypatch):
    model_dir, _ = family
    degraded = with_lora(make_model(FAMILIES[path.parent.name]))
    degraded.peft_config["default"].base_model_name_or_path = str(model_dir)
    degraded.save_pretrained(tmp_path / "degraded")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        )
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    recipe = yaml.safe_load(path.read_text()) | {
        "aligned_model": str(model_dir),
        "degraded_model": str(tmp_path / "degraded"),
        "output_dir": str(tmp_path / "made"),
        "harmful_data": str(tmp_path / "harmful.jsonl"),
        "benign_data": str(tmp_path / "benign.jsonl"),
        "dtype": "float32",
    }
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe))
    (arguments,) = parse((ExtractionConfig,), ["--config", str(edited)], "safegene extract", "")
    assert arguments.method == "delta"
    assert main(["extract", "--config", str(edited)]) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "made")
    vector.check_fits(canonical_modules(make_model(FAMILIES[path.parent.name])))
    assert vector.layers == [0, 1, 2] and vector.prompts


@pytest.mark.parametrize("path", [TRANSPORT], ids=name_of)
def test_a_transport_by_the_recipe(path, tmp_path, monkeypatch):
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    source, tokenizer = planted.source_tokenizer(), planted.target_tokenizer()
    model = planted.planted_model("llama", source, 32, 3, seed=5)
    planted.save(model, source, tmp_path / "source")
    vector = make_vector(model, source, planted.planted_delta(model, source, seed=5)[0])
    vector.selection["selected_layers"], vector.extraction["rank"] = [0], 1
    vector.save_pretrained(tmp_path / "vector")
    target = planted.planted_model("qwen2", tokenizer, 48, 4, seed=6)
    planted.save(target, tokenizer, tmp_path / "target")
    places = planted.prompt_files(tmp_path) | {
        "aligned_model": tmp_path / "target",
        "source_model": tmp_path / "source",
        "source_vector": tmp_path / "vector",
        "output_dir": tmp_path / "made",
    }
    recipe = yaml.safe_load(path.read_text()) | {key: str(value) for key, value in places.items()}
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe | {"dtype": "float32"}))
    assert main(["extract", "--config", str(edited)]) == 0
    made = SafetyVector.from_pretrained(tmp_path / "made")
    made.check_fits(canonical_modules(target))
    assert made.extraction["method"] == "transport" and len(made.layers) == 2


@pytest.mark.parametrize("path", [RETARGETING], ids=name_of)
def test_new_prompts_by_the_recipe(path, family, tmp_path, monkeypatch):
    model_dir, vector_dir = family
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    recipe = yaml.safe_load(path.read_text()) | {
        "aligned_model": str(model_dir),
        "vector": str(vector_dir),
        "output_dir": str(tmp_path / "made"),
        "dtype": "float32",
    }
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{text}, then"}) + "\n" for text in prompts))
        recipe[f"{name}_data"] = str(file)
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe))
    assert main(["extract", "--config", str(edited)]) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "made")
    before = SafetyVector.from_pretrained(vector_dir)
    assert vector.files["adapter_model.safetensors"] == before.files["adapter_model.safetensors"]
    assert len(vector.prompts) == 2 * len(before.prompts)


@pytest.mark.parametrize("path", [BY_CATEGORY], ids=name_of)
def test_a_vector_by_category_by_the_recipe(path, family, tmp_path, monkeypatch):
    model_dir, vector_dir = family
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    recipe = yaml.safe_load(path.read_text()) | {
        "aligned_model": str(model_dir),
        "vector": str(vector_dir),
        "output_dir": str(tmp_path / "made"),
        "dtype": "float32",
    }
    harmful = [
        {"prompt": f"{text}, by {name}", "category": name}
        for text in HARMFUL
        for name in ("a", "b")
    ]
    benign = [{"prompt": f"{text}, then"} for text in BENIGN]
    for name, rows in (("harmful", harmful), ("benign", benign)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe[f"{name}_data"] = str(file)
    edited = tmp_path / "recipe.yaml"
    edited.write_text(yaml.safe_dump(recipe))
    assert main(["extract", "--config", str(edited)]) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "made")
    assert vector.component_names == ["shared", "a", "b"]
    assert vector.extraction["by_category"]["without_category"] == len(HARMFUL)  # the vector's own
