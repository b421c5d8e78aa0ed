"""`safegene evaluate` from prompts to numbers, cut off and resumed."""

import json

import pytest
import yaml

from safegene_trl.commands.main import main
from safegene_trl.evaluation import evaluate as module
from safegene_trl.evaluation.evaluate import GENERATIONS, RESULT, SETTINGS, VERDICTS, EvaluationConfig, evaluate

from ..conftest import ALONE, BENIGN, HARMFUL, make_model, save_utility_task, with_lora


@pytest.fixture
def sets(tmp_path):
    """Two prompt files."""
    for name, prompts in (("forbidden", HARMFUL), ("cooking", BENIGN)):
        rows = [{"prompt": text, "category": "even" if i % 2 == 0 else "odd"} for i, text in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def config(sets, model_dir):
    return EvaluationConfig(
        model_name_or_path=str(model_dir),
        harmful_data=[str(sets / "forbidden.jsonl")],
        benign_data=[str(sets / "cooking.jsonl")],
        max_new_tokens=4,
        batch_size=1,
        output_dir=str(sets / "out"),
    )


def words(config):
    found = []
    for name, value in vars(config).items():
        if isinstance(value, list) and value:
            found += [f"--{name}", *value]
        elif not isinstance(value, list) and value is not None:
            found += [f"--{name}", str(value)]
    return found


def test_numbers_answers_and_settings_are_kept(config, sets, capsys):
    assert main(["evaluate", *words(config)]) == 0
    result = json.loads((sets / "out" / RESULT).read_text())
    rows = [json.loads(line) for line in (sets / "out" / GENERATIONS).read_text().splitlines()]
    assert len(rows) == len(HARMFUL) + len(BENIGN) and all("answer" in row for row in rows)
    judge = result["judges"]["refusal_phrases"]
    assert sum(judge["sets"]["forbidden"]["labels"].values()) == len(HARMFUL)
    assert set(judge["sets"]["cooking"]["categories"]) == {"even", "odd"}
    settings = result["settings"]
    assert settings["max_new_tokens"] == 4 and settings["decoding"] == "greedy" and settings["padding"] == "left"
    assert settings["chat_template"] and settings["software"]["torch"]
    assert set(settings["model"]["files"]) == {"config.json", "model.safetensors"}
    printed = capsys.readouterr().out
    assert "forbidden" in printed and "attack success, mean over the sets" in printed


def test_a_run_that_was_cut_off_goes_on(config, sets, monkeypatch):
    evaluate(config, ALONE)
    whole = (sets / "out" / RESULT).read_bytes()
    lines = (sets / "out" / GENERATIONS).read_text().splitlines(keepends=True)
    (sets / "out" / GENERATIONS).write_text("".join(lines[:6]) + lines[6][:25])  # killed in the middle of a line
    (sets / "out" / VERDICTS).unlink()
    asked = []
    generate = module.generate_answers

    def counted(model, tokenizer, messages, *rest):
        asked.extend(messages)
        return generate(model, tokenizer, messages, *rest)

    monkeypatch.setattr(module, "generate_answers", counted)
    evaluate(config, ALONE)
    assert len(asked) == len(HARMFUL) + len(BENIGN) - 6
    assert (sets / "out" / RESULT).read_bytes() == whole


def test_judging_again_needs_no_model(config, monkeypatch):
    evaluate(config, ALONE)

    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_placed", load)
    config.task_labels = ["positive"]
    assert evaluate(config, ALONE) is not None


def test_answers_of_another_run_are_refused(config, sets, model_dir, capsys):
    evaluate(config, ALONE)
    config.max_new_tokens = 5
    assert main(["evaluate", *words(config)]) == 2
    assert "another `max_new_tokens`: choose another `output_dir`" in capsys.readouterr().err
    config.max_new_tokens = 4
    make_model(seed=5).save_pretrained(model_dir)
    assert main(["evaluate", *words(config)]) == 2
    assert "another `model`" in capsys.readouterr().err
    (sets / "out" / SETTINGS).unlink()
    assert main(["evaluate", *words(config)]) == 2
    assert "without their settings" in capsys.readouterr().err


def test_an_adapter(config, sets, model_dir, tokenizer):
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(sets / "adapter")
    config.model_name_or_path = str(sets / "adapter")
    found = evaluate(config, ALONE)
    assert found["settings"]["base_model"]["name"] == "model"
    assert "adapter_model.safetensors" in found["settings"]["model"]["files"]


def test_prompts_of_the_vector_are_left_out(config, sets, vector_dir, capsys):
    config.exclude_data = [str(vector_dir)]
    assert main(["evaluate", *words(config)]) == 2
    assert "Every prompt of" in capsys.readouterr().err
    with (sets / "forbidden.jsonl").open("a") as file:
        file.write('{"prompt": "an entirely unrelated question"}\n')
    config.benign_data = []
    assert main(["evaluate", *words(config)]) == 0
    assert "12 prompts left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": ""}, "`model_name_or_path` is empty"),
        ({"harmful_data": [], "benign_data": []}, "nothing to evaluate on"),
        ({"judges": ["nobody"]}, "no judge `nobody`"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"harmful_data": ["nowhere.jsonl"]}, "cannot be read"),
        ({"model_name_or_path": "nowhere/at-all"}, "cannot be loaded"),
    ],
)
def test_bad_settings_are_named(config, sets, changes, message, capsys):
    for name, value in changes.items():
        setattr(config, name, value)
    (sets / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in vars(config).items() if v is not None}))
    assert main(["evaluate", "--config", str(sets / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (sets / "out" / GENERATIONS).exists()


def test_utility_by_a_task_of_ones_own(config, sets):
    pytest.importorskip("lm_eval")
    save_utility_task(sets / "tasks")
    config.tasks, config.tasks_dir = ["boxes"], str(sets / "tasks")
    found = evaluate(config, ALONE)["utility"]
    assert 0 <= found["results"]["boxes"]["acc,none"] <= 1 and found["samples"]["boxes"] == 6
    assert found["versions"]["lm_eval"]


def test_unknown_task_is_named_before_anything_runs(config, sets, capsys):
    pytest.importorskip("lm_eval")
    config.tasks = ["no_such_task_at_all"]
    assert main(["evaluate", *words(config)]) == 2
    assert "knows no task `no_such_task_at_all`" in capsys.readouterr().err
    assert not (sets / "out" / GENERATIONS).exists()
