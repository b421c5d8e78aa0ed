"""`safegene evaluate` from prompts to numbers, cut off and resumed."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from safegene_trl.checkpoints.locking import alone_in
from safegene_trl.commands.main import main
from safegene_trl.errors import ConfigError, OutputError
from safegene_trl.evaluation import evaluate as module
from safegene_trl.evaluation.config import EvaluationConfig
from safegene_trl.evaluation.evaluate import (
    GENERATIONS,
    RESULT,
    SETTINGS,
    VERDICTS,
    evaluate,
)
from safegene_trl.evaluation.json_lines import read_lines
from safegene_trl.judges import Verdict
from safegene_trl.models import batch_size

from ..conftest import BENIGN, HARMFUL, make_model, save_utility_task, with_lora
from ..reasoning_templates import reasoning_tokenizer


@pytest.fixture
def sets(tmp_path):
    """Two prompt files."""
    for name, prompts in (("forbidden", HARMFUL), ("cooking", BENIGN)):
        rows = [
            {"prompt": text, "category": "even" if i % 2 == 0 else "odd"}
            for i, text in enumerate(prompts)
        ]
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
    assert (
        settings["max_new_tokens"] == 4
        and settings["decoding"] == "greedy"
        and settings["padding"] == "left"
    )
    assert settings["chat_template"] and settings["software"]["torch"]
    assert set(settings["model"]["files"]) == {"config.json", "model.safetensors"}
    printed = capsys.readouterr().out
    assert (
        "forbidden" in printed
        and f"of {len(HARMFUL)}   refused" in printed
        and "no chat template" not in printed
    )


def test_a_run_that_was_cut_off_goes_on(config, sets, monkeypatch):
    evaluate(config)
    whole = (sets / "out" / RESULT).read_bytes()
    lines = (sets / "out" / GENERATIONS).read_text().splitlines(keepends=True)
    # killed in the middle of a line
    (sets / "out" / GENERATIONS).write_text("".join(lines[:6]) + lines[6][:25])
    (sets / "out" / VERDICTS).unlink()
    asked = []
    generate = module.answers_to_tokens

    def counted(model, tokenizer, prompts, *rest):
        asked.extend(prompts)
        return generate(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(module, "answers_to_tokens", counted)
    evaluate(config)
    assert len(asked) == len(HARMFUL) + len(BENIGN) - 6
    assert (sets / "out" / RESULT).read_bytes() == whole


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_prompts_of_all_sets_share_batches_of_like_numbers_of_tokens(
    batch_size, config, sets, monkeypatch
):
    rows = [{"prompt": text + " and another" * i} for i, text in enumerate(HARMFUL)]
    (sets / "forbidden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(config)
    texts = {row["key"]: row["answer"] for row in answered(config)}
    shapes, read = [], []
    load, tokenized = module.load_placed, module.prompt_tokens

    def watched(*arguments):
        model, sharding = load(*arguments)
        generate = model.generate
        model.generate = lambda **given: (
            shapes.append(given["input_ids"].shape) or generate(**given)
        )
        return model, sharding

    monkeypatch.setattr(module, "load_placed", watched)
    monkeypatch.setattr(
        module, "prompt_tokens", lambda *given: read.extend(tokenized(*given)) or read
    )
    config.batch_size, config.output_dir = batch_size, config.output_dir + " again"
    evaluate(config)
    count = len(HARMFUL) + len(BENIGN)
    assert len(read) == count and len(shapes) == math.ceil(count / batch_size)
    # the longest first, a few batches at a time
    part = 4 * batch_size
    lengths = sorted(map(len, read), reverse=True)
    expected = [
        sorted(lengths[start : start + part])[first : first + batch_size]
        for start in range(0, count, part)
        for first in range(0, min(part, count - start), batch_size)
    ]
    assert shapes == [(len(group), max(group)) for group in expected]
    assert {row["key"]: row["answer"] for row in answered(config)} == texts


def small_device(monkeypatch, limit):
    """A device with memory for so many prompts at once; the sizes of the batches, as they come."""
    sizes, generate = [], module.answers_to_tokens

    def answers(model, tokenizer, prompts, new_tokens, batch_size, sharding):
        sizes.append(batch_size)
        if min(batch_size, len(prompts)) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(model, tokenizer, prompts, new_tokens, batch_size, sharding)

    monkeypatch.setattr(module, "answers_to_tokens", answers)
    return sizes


def test_memory_that_runs_out_halves_the_batches_for_the_rest_of_the_run(
    config, monkeypatch, caplog
):
    evaluate(config)
    expected = {row["key"]: row["answer"] for row in answered(config)}
    sizes = small_device(monkeypatch, 2)
    config.batch_size, config.output_dir = 8, config.output_dir + " again"
    evaluate(config)
    assert sizes == [8, 4, 2] and "The evaluation ran out of memory" in caplog.text
    assert {row["key"]: row["answer"] for row in answered(config)} == expected
    # what is asked next begins with what there was memory for
    sizes.clear()
    config.batch_size, config.output_dir = 3, config.output_dir + " and again"
    evaluate(config)
    count = len(HARMFUL) + len(BENIGN)
    assert sizes == [3, 1, *[1] * math.ceil((count - 12) / 4)]


def test_a_device_that_has_no_room_for_one_prompt_is_named(config, monkeypatch, capsys):
    small_device(monkeypatch, 0)
    assert main(["evaluate", *words(config)]) == 2
    said = capsys.readouterr().err
    assert "The evaluation ran out of memory with one sample at a time: lower" in said


def test_a_device_that_the_model_does_not_fit_on_is_named(config, monkeypatch, capsys):
    def load(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "load_placed", load)
    assert main(["evaluate", *words(config)]) == 2
    assert "The evaluation ran out of memory: set a smaller `batch_size`" in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "most"), [(0, 128), (19, 6)])
def test_an_unset_size_is_what_the_free_memory_is_for(shift, most, config, monkeypatch):
    monkeypatch.setattr(batch_size, "has_own_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**38 >> shift)
    sizes = small_device(monkeypatch, 1000)
    config.batch_size = None
    evaluate(config)
    assert set(sizes) == {128} if most == 128 else 1 <= max(sizes) == min(sizes) <= most


def test_on_a_cpu_an_unset_size_is_8(config, monkeypatch):
    sizes = small_device(monkeypatch, 1000)
    config.batch_size = None
    evaluate(config)
    assert set(sizes) == {8}


def answered(config):
    lines = (Path(config.output_dir) / GENERATIONS).read_text().splitlines()
    return list(map(json.loads, lines))


def test_judging_again_needs_no_model(config, monkeypatch):
    evaluate(config)

    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_placed", load)
    config.task_labels = ["positive"]
    assert evaluate(config) is not None


def test_answers_of_another_run_are_refused(config, sets, model_dir, capsys):
    evaluate(config)
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


def test_an_adapter(config, sets, model_dir, tokenizer, monkeypatch):
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(sets / "adapter")
    config.model_name_or_path = str(sets / "adapter")
    found = evaluate(config)
    assert found["settings"]["base_model"]["name"] == "model"
    assert "adapter_model.safetensors" in found["settings"]["model"]["files"]
    folded = {row["key"]: row["answer"] for row in answered(config)}
    monkeypatch.setattr(module, "fold_adapters", lambda *given: False)
    config.output_dir += " beside the weights"
    evaluate(config)
    assert {row["key"]: row["answer"] for row in answered(config)} == folded


def test_answers_with_the_adapter_beside_the_weights_are_not_mixed_with_others(
    config, sets, model_dir, monkeypatch
):
    """Versions before the LoRA was folded in said nothing of it in their settings."""
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(sets / "adapter")
    config.model_name_or_path = str(sets / "adapter")
    settings = module._settings

    def older(*given):
        return {key: value for key, value in settings(*given).items() if key != "lora"}

    with monkeypatch.context() as before:
        before.setattr(module, "_settings", older)
        evaluate(config)
    with pytest.raises(OutputError, match="another `lora`, as of an older version: choose another"):
        evaluate(config)


def test_answers_of_an_adapter_on_a_sharded_base_are_not_mixed_with_others(
    config, sets, model_dir, monkeypatch
):
    """There it stays beside the weights: in 16 bits the same model may answer otherwise."""
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(sets / "adapter")
    config.model_name_or_path = str(sets / "adapter")
    for sharded in (True, False):
        config.output_dir = str(sets / f"sharded {sharded}")
        monkeypatch.setattr(module, "loads_sharded", lambda sharded=sharded: sharded)
        assert evaluate(config)["settings"]["lora"].startswith("beside") == sharded
        evaluate(config)
        monkeypatch.setattr(module, "loads_sharded", lambda sharded=sharded: not sharded)
        with pytest.raises(OutputError, match="another `lora`: choose another"):
            evaluate(config)


def test_an_adapter_is_in_the_weights_while_it_answers(
    config, sets, model_dir, tokenizer, monkeypatch
):
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(sets / "adapter")
    config.model_name_or_path = str(sets / "adapter")
    loaded, active, load = [], [], module.load_placed

    def kept(*arguments):
        model, sharding = load(*arguments)
        loaded.append(model)
        return model, sharding

    def answers(model, *rest):
        layers = [each for each in model.modules() if isinstance(each, LoraLayer)]
        active.extend(not layer.disable_adapters for layer in layers)
        return generate(model, *rest)

    generate = module.answers_to_tokens
    monkeypatch.setattr(module, "load_placed", kept)
    monkeypatch.setattr(module, "answers_to_tokens", answers)
    evaluate(config)
    assert active and not any(active)
    weight = loaded[0].get_base_model().model.layers[1].mlp.down_proj.base_layer.weight
    assert not torch.equal(weight, make_model().model.layers[1].mlp.down_proj.weight)


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
        ({"harmful_data": ["nowhere.jsonl"]}, "is not there"),
        (
            {"model_name_or_path": "nowhere/at-all"},
            "neither a local directory nor a readable hub repository",
        ),
    ],
)
def test_bad_settings_are_named(config, sets, changes, message, capsys):
    for name, value in changes.items():
        setattr(config, name, value)
    (sets / "recipe.yaml").write_text(
        yaml.safe_dump({k: v for k, v in vars(config).items() if v is not None})
    )
    assert main(["evaluate", "--config", str(sets / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (sets / "out" / GENERATIONS).exists()


def test_utility_by_a_task_of_ones_own(config, sets):
    pytest.importorskip("lm_eval")
    save_utility_task(sets / "tasks")
    config.tasks, config.tasks_dir = ["boxes"], str(sets / "tasks")
    found = evaluate(config)["utility"]
    assert 0 <= found["results"]["boxes"]["acc,none"] <= 1 and found["samples"]["boxes"] == 6
    assert found["versions"]["lm_eval"]


def test_unknown_task_is_named_before_anything_runs(config, sets, capsys):
    pytest.importorskip("lm_eval")
    config.tasks = ["no_such_task_at_all"]
    assert main(["evaluate", *words(config)]) == 2
    assert "knows no task `no_such_task_at_all`" in capsys.readouterr().err
    assert not (sets / "out" / GENERATIONS).exists()


@pytest.fixture
def asked(monkeypatch):
    """A judge that is asked one by one, notes what about, and fails at the answer whose number is
    in `fails`.
    """

    class Counting:
        name, sees, batch = "counting", "refusals", 1

        def __init__(self):
            self.asked, self.fails = [], None

        def __call__(self, exchanges):
            if exchanges and len(self.asked) == self.fails:
                raise RuntimeError("CUDA out of memory.\nTried to allocate")
            self.asked += exchanges
            return [Verdict("answered", 1.0) for _ in exchanges]

        def describe(self):
            return {}

    judge = Counting()
    monkeypatch.setattr(module, "load_judge", lambda spec: judge)
    monkeypatch.setattr("safegene_trl.judges.is_incoherent", lambda answer: False)
    return judge


def test_what_a_judge_said_before_it_failed_is_kept(config, asked, sets, capsys):
    asked.fails = 5
    assert main(["evaluate", *words(config)]) == 2
    error = capsys.readouterr().err
    assert (
        "The judge counting failed (RuntimeError: CUDA out of memory. Tried"
        in error.splitlines()[-1]
    )
    assert len(read_lines(sets / "out" / VERDICTS)) == 5
    asked.fails = None
    evaluate(config)
    assert len(asked.asked) == len(HARMFUL) + len(BENIGN)
    evaluate(config)
    assert len(asked.asked) == len(HARMFUL) + len(BENIGN)


def test_verdicts_are_about_their_very_answers(config, asked, sets, model_dir, monkeypatch, capsys):
    evaluate(config)
    count = len(asked.asked)
    rows = read_lines(sets / "out" / GENERATIONS)
    # one answer is edited: its verdict is none any more
    rows[3]["answer"] = "something else"
    (sets / "out" / GENERATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(config)
    assert [exchange.answer for exchange in asked.asked[count:]] == ["something else"]
    # only the answers are deleted, and the model is another one
    (sets / "out" / GENERATIONS).unlink()
    make_model(seed=5).save_pretrained(model_dir)
    before = {path: path.read_bytes() for path in (sets / "out").iterdir()}
    assert main(["evaluate", *words(config)]) == 2
    assert "another `model`" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (sets / "out").iterdir()}
    # even where the settings are gone with them
    (sets / "out" / SETTINGS).unlink()
    assert main(["evaluate", *words(config)]) == 2
    assert "verdicts without their settings" in capsys.readouterr().err


def test_answers_from_another_folder_are_refused(config, sets, model_dir, capsys):
    evaluate(config)
    rows = read_lines(sets / "out" / GENERATIONS)
    make_model(seed=5).save_pretrained(model_dir)
    config.output_dir = str(sets / "second")
    evaluate(config)
    (sets / "second" / GENERATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", *words(config)]) == 2
    assert "answers or verdicts of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (GENERATIONS, '{"key": "a", "answ', "Line 3 of"),
        (GENERATIONS, "[1]", "Line 3 of"),
        (GENERATIONS, '{"key": "a"}', "Answer 3 in"),
        (VERDICTS, "\x00\x00", "Line 3 of"),
        (VERDICTS, '{"key": "a", "label": "good"}', "answers or verdicts of another run"),
    ],
)
def test_damage_in_the_middle_is_named(file, line, message, config, sets, capsys):
    evaluate(config)
    lines = (sets / "out" / file).read_text().splitlines()
    (sets / "out" / file).write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    assert main(["evaluate", *words(config)]) == 2
    assert message in capsys.readouterr().err


def test_a_verdict_of_another_shape_is_named(config, sets, capsys):
    evaluate(config)
    rows = read_lines(sets / "out" / VERDICTS)
    for change in ({"label": "good"}, {"score": "high"}, {"answer": 3}):
        text = "".join(
            json.dumps(row | (change if number == 1 else {})) + "\n"
            for number, row in enumerate(rows)
        )
        (sets / "out" / VERDICTS).write_text(text)
        assert main(["evaluate", *words(config)]) == 2
        assert "Verdict 2 in" in capsys.readouterr().err


def test_torn_verdicts_are_given_again(config, asked, sets):
    evaluate(config)
    count = len(asked.asked)
    text = (sets / "out" / VERDICTS).read_text()
    (sets / "out" / VERDICTS).write_text(text[: text.rindex("{") + 9])
    evaluate(config)
    assert len(asked.asked) == count + 1 and len(read_lines(sets / "out" / VERDICTS)) == count


def test_one_evaluation_at_a_time_in_a_folder(config, sets, capsys):
    with alone_in(sets / "out", "evaluation"):
        assert main(["evaluate", *words(config)]) == 2
        assert "Another evaluation is at work in" in capsys.readouterr().err
        assert [path.name for path in (sets / "out").iterdir()] == [".lock"]
    assert main(["evaluate", *words(config)]) == 0


def test_numbers_of_an_earlier_run_do_not_outlive_its_answers(config, sets, monkeypatch):
    evaluate(config)
    for name in (GENERATIONS, VERDICTS):
        (sets / "out" / name).unlink()
    monkeypatch.setattr(module, "generated", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(config)
    assert not (sets / "out" / RESULT).exists()


def test_the_folder_of_a_model_or_of_a_vector_is_not_written_into(
    config, model_dir, vector_dir, tmp_path, capsys
):
    (tmp_path / "link").symlink_to(model_dir)
    for folder in (model_dir, tmp_path / "link", vector_dir):
        before = sorted(folder.iterdir())
        config.output_dir, config.exclude_data = str(folder), [str(vector_dir)]
        assert main(["evaluate", *words(config)]) == 2
        assert (
            "would be written into" in capsys.readouterr().err
            and sorted(folder.iterdir()) == before
        )


@pytest.fixture
def bare(model_dir):
    """The model's folder, without its chat template."""
    (model_dir / "chat_template.jinja").unlink()
    return model_dir


def test_a_model_without_a_chat_template_is_asked_in_plain_text_and_that_is_said(
    config, bare, sets, capsys, caplog
):
    assert main(["evaluate", *words(config)]) == 0
    assert "prompts went to the model as plain text" in capsys.readouterr().out
    assert "has no chat template: prompts go to the model as plain text" in caplog.text
    assert json.loads((sets / "out" / RESULT).read_text())["settings"]["chat_template"] is None


def test_turns_need_a_chat_template(config, bare, sets, capsys):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name a river"}]
    (sets / "cooking.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert main(["evaluate", *words(config)]) == 2
    assert (
        "has no chat template to tell the turns" in capsys.readouterr().err
        and not (sets / "out").exists()
    )


def test_a_model_that_lost_its_chat_template_is_refused(
    config, bare, sets, vector_dir, tmp_path, capsys
):
    config.exclude_data = [str(vector_dir)]
    (sets / "forbidden.jsonl").write_text('{"prompt": "where is the treasure"}\n')
    (sets / "cooking.jsonl").write_text('{"prompt": "what is a river"}\n')
    assert main(["evaluate", *words(config)]) == 2
    assert (
        f"The safety vector {vector_dir} was made with a chat template" in capsys.readouterr().err
    )
    config.exclude_data = []
    (bare / "safegene_report.json").write_text('{"model": {"chat_template": "00"}}')
    assert main(["evaluate", *words(config)]) == 2
    assert (
        f"{bare} was safeguarded with a chat template" in capsys.readouterr().err
        and not (sets / "out").exists()
    )
    (bare / "safegene_report.json").write_text('{"model": {"chat_template": null}}')
    assert main(["evaluate", *words(config)]) == 0


def reasoning_model(folder, kind):
    tokenizer = reasoning_tokenizer(kind)
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_judges_read_what_comes_after_the_reasoning(config, sets, monkeypatch, caplog, capsys):
    reasoning_model(config.model_name_or_path, "stripped")
    said = [
        "I can't help with it.</think>Take this.",
        "Take this.</think>I can't help with it.",
        "So",
    ]
    asked = []

    def answers(model, tokenizer, prompts, new_tokens, *rest):
        asked.extend([new_tokens] * len(prompts))
        return [said[(len(asked) + i) % 3] for i in range(len(prompts))]

    monkeypatch.setattr(module, "answers_to_tokens", answers)
    assert main(["evaluate", *words(config), "--max_reasoning_tokens", "9"]) == 0
    assert set(asked) == {4 + 9}
    rows = answered(config)
    assert {row["answer"] for row in rows} == {"Take this.", "I can't help with it.", ""}
    assert all(row["finished"] == bool(row["answer"]) and row["reasoning"] for row in rows)
    result = json.loads((sets / "out" / RESULT).read_text())
    found = result["judges"]["refusal_phrases"]["sets"]["forbidden"]
    assert found["labels"] == {"answered": 4, "refused": 4, "unfinished": 4}
    assert found["attack_success"]["share"] == 0.5 and found["unfinished"]["successes"] == 4
    assert result["settings"]["max_reasoning_tokens"] == 9
    assert "4 unfinished" in capsys.readouterr().out and "never left" not in caplog.text


def test_a_model_that_never_stops_thinking_is_warned_of(config, monkeypatch, caplog):
    reasoning_model(config.model_name_or_path, "stripped")
    monkeypatch.setattr(module, "answers_to_tokens", lambda *given: ["I think"] * len(given[2]))
    config.max_reasoning_tokens = 9
    result = evaluate(config)
    assert "20 of 20 answers never left the reasoning" in caplog.text
    assert result["judges"]["refusal_phrases"]["attack_success"] is None


def test_reasoning_for_which_the_context_has_no_room_is_refused_before_any_answer(
    config, sets, monkeypatch, caplog
):
    reasoning_model(config.model_name_or_path, "stripped")
    monkeypatch.setattr(module, "answers_to_tokens", lambda *given: ["Take this."] * len(given[2]))
    with (sets / "forbidden.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "word " * 20}) + "\n")
    config.max_reasoning_tokens = 10**6
    with pytest.raises(
        ConfigError, match=r"`max_reasoning_tokens` is 1000000, and the mod"
    ) as error:
        evaluate(config)
    assert not (sets / "out" / GENERATIONS).exists()
    config.max_reasoning_tokens = int(str(error.value).split()[-3])
    config.output_dir = str(sets / "second")
    evaluate(config)  # the shortest prompt leaves so much
    assert "1 of 21 prompts leave the model's context of" in caplog.text


def test_reasoning_tokens_that_change_nothing_are_warned_of(config, monkeypatch, caplog):
    monkeypatch.setattr(module, "answers_to_tokens", lambda *given: ["Take this."] * len(given[2]))
    config.max_reasoning_tokens = 77
    evaluate(config)
    assert "`max_reasoning_tokens` is 77 and changes nothing" in caplog.text


def test_the_templates_arguments_are_part_of_what_decides_an_answer(config, sets, monkeypatch):
    reasoning_model(config.model_name_or_path, "hybrid")
    ends = []

    def answers(model, tokenizer, prompts, new_tokens, *rest):
        ends.extend(tokenizer.decode(ids[-4:]) for ids in prompts)
        return ["Take this."] * len(prompts)

    monkeypatch.setattr(module, "answers_to_tokens", answers)
    evaluate(config)
    assert all("</think>" in end for end in ends)
    config.chat_template_kwargs = '{"enable_thinking": false}'
    with pytest.raises(OutputError, match="another `chat_template_kwargs`"):
        evaluate(config)
    config.chat_template_kwargs = {"enable_thinkng": False}
    with pytest.raises(ConfigError, match=r"`chat_template_kwargs` has `enable_thinkng`"):
        evaluate(config)
    config.chat_template_kwargs = "{enable_thinking}"
    with pytest.raises(ConfigError, match="names that the chat template knows"):
        evaluate(config)


class _Contrary:
    """Sees refusals, and says the contrary of the first judge of every other answer."""

    name, sees, batch = "contrary", "refusals", 8

    def __call__(self, exchanges):
        labels = ["refused" if "help" in one.answer else "answered" for one in exchanges]
        labels[::2] = ["answered" if label == "refused" else "refused" for label in labels[::2]]
        return [Verdict(label) for label in labels]

    def describe(self):
        return {}


def test_two_judges_have_their_disagreement_beside_every_share(config, sets, monkeypatch, capsys):
    monkeypatch.setattr(
        module, "answers_to_tokens", lambda *given: ["I can't help."] * len(given[2])
    )
    load = module.load_judge
    monkeypatch.setattr(
        module, "load_judge", lambda spec: _Contrary() if spec == "contrary" else load(spec)
    )
    config.judges = ["refusal_phrases", "contrary"]
    assert main(["evaluate", *words(config)]) == 0
    result = json.loads((sets / "out" / RESULT).read_text())
    for judge in result["judges"].values():
        for own in judge["sets"].values():
            assert own["disagreement"]["share"] == 0.5
            assert own["disagreement"]["count"] == sum(own["labels"].values())
        for mean in ("attack_success", "over_refusal"):
            assert judge[mean]["disagreement"]["share"] == 0.5
    both = ["refusal_phrases", "contrary"]
    assert result["compared"] == {"harmful": both, "benign": both}
    assert capsys.readouterr().out.count("judges disagree 50.0 [") == 4
    config.judges = ["refusal_phrases"]
    alone = evaluate(config)
    assert "compared" not in alone and "disagreement" not in json.dumps(alone)
