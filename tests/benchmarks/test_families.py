"""The table for other models than the first: how they are trained, named, ordered and run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import records
from benchmarks.paper_table import __main__ as command
from benchmarks.paper_table import families, methods, schedule, vectors
from benchmarks.paper_table.calibration import promises
from benchmarks.paper_table.families import FAMILIES, SMOLLM2
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.render import CELLS, load, of_family, render
from benchmarks.paper_table.schedule import Budget, expected_seconds, ordered
from benchmarks.paper_table.tasks import TASKS, batch_size, training_steps
from safegene_trl.errors import SafeGeneError
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import make_model, with_lora


QWEN = FAMILIES["qwen2.5-coder-0.5b"]
LABELS = {"BT": "ra", "DR": "aa", "look-alikes": "ra", "contrast": "aa"}


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(families, "device", lambda: torch.device("cuda"))


def test_every_family_is_found_by_its_name():
    assert list(FAMILIES) == [
        "smollm2-135m",
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
        "qwen2.5-coder-0.5b-cpu",
    ]
    assert FAMILIES["qwen2.5-coder-1.5b"].aligned == "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert all(name == family.name for name, family in FAMILIES.items())


def test_the_first_family_is_trained_as_its_records_say(monkeypatch):
    settings = SMOLLM2.training
    assert settings["use_cpu"] is True and settings["bf16"] is False
    assert (settings["dtype"], settings["max_length"]) == ("float32", 256)
    assert (settings["lora_r"], settings["lora_alpha"]) == (8, 16)
    assert "attn_implementation" not in settings
    for cell in records.load(CELLS).values():
        if cell.get("family", SMOLLM2.name) == SMOLLM2.name:
            task = TASKS[cell["task"]]
            assert cell["training"]["steps"] == training_steps(task, SMOLLM2)
            assert cell["training"]["batch_size"] == batch_size(task, SMOLLM2)
            assert cell["training"]["learning_rate"] == SMOLLM2.learning_rate


def test_on_an_accelerator_training_is_in_bfloat16(monkeypatch):
    on_a_gpu(monkeypatch)
    for family in FAMILIES.values():
        assert family.dtype == family.training["dtype"] == "bfloat16"
        assert family.training["bf16"] is True and "use_cpu" not in family.training


def test_a_small_set_keeps_its_batch_and_its_epochs():
    assert batch_size(TASKS["sst2"], QWEN) == 16 and training_steps(TASKS["sst2"], QWEN) == 100
    assert batch_size(TASKS["poisoned"], QWEN) == 4  # of 20 samples
    assert training_steps(TASKS["poisoned"], QWEN) * 4 == 10 * 20


def test_files_and_records_of_families_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "WORK", tmp_path)
    assert SMOLLM2.work == tmp_path and QWEN.work == tmp_path / "qwen2.5-coder-0.5b"
    assert command.cell_name("sst2", 0, "uniform λ") == "sst2-0-uniform-lambda"
    name = command.cell_name("sst2", 1, "WiSE-FT, α = 0.5", QWEN)
    assert name == "qwen2.5-coder-0.5b-sst2-1-wise-ft-alpha-0-5"
    found = {
        "old": {"task": "sst2", "method": "aligned", "seed": 0},
        "new": {"task": "sst2", "method": "aligned", "seed": 0, "family": QWEN.name},
    }
    assert of_family(found, SMOLLM2.name) == [found["old"]]
    assert of_family(found, QWEN.name) == [found["new"]]


def cell(method, family=None, seed=0, task="sst2", **more):
    found = {
        "task": task,
        "seed": seed,
        "method": method,
        "labels": LABELS,
        "utility": [1.0, 0.0],
        "about": {},
        "seconds": 10.0,
        "method_seconds": 1.0,
        "device": "cpu",
        "dtype": "float32",
    }
    return found | ({} if family is None else {"family": family}) | more


def test_families_are_drawn_apart(tmp_path):
    pytest.importorskip("matplotlib")
    for method in ("aligned", "fine-tuned", "SafeGene"):
        records.write(CELLS, method, cell(method), tmp_path)
        records.write(CELLS, f"q {method}", cell(method, QWEN.name, dtype="bfloat16"), tmp_path)
    assert {family: list(load(tmp_path, family)) for family in FAMILIES} == {
        "smollm2-135m": ["sst2"],
        "qwen2.5-coder-0.5b": ["sst2"],
        "qwen2.5-coder-1.5b": [],
        "qwen2.5-coder-0.5b-cpu": [],
    }
    assert len(load(tmp_path)["sst2"]["SafeGene"].cells) == 1
    render(tmp_path)
    text = (tmp_path / "paper_table.md").read_text()
    first, second = text.split("# qwen2.5-coder-0.5b\n")
    assert "bfloat16 on cpu" in second and "bfloat16" not in first
    assert first.count("| SafeGene |") == second.count("| SafeGene |") == 2
    assert (tmp_path / "paper_table-qwen2.5-coder-0.5b.png").is_file()
    assert not (tmp_path / "paper_table-qwen2.5-coder-1.5b.png").exists()


# The vector


def test_a_vector_is_combined_of_harmless_degradations(tmp_path, monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(families, "WORK", tmp_path)
    monkeypatch.setattr(vectors, "device", families.device)
    trained, said, joined = {}, [], []
    monkeypatch.setattr(
        vectors,
        "sft",
        lambda folder, file, family, **o: trained.update({folder: (file, o)}) or folder,
    )
    monkeypatch.setattr(vectors, "safegene", lambda *words: said.append(words))
    monkeypatch.setattr(vectors, "combine", lambda parts, folder: joined.append((parts, folder)))
    folder = vectors.vector("three components", tmp_path, QWEN)
    parts = [QWEN.work / "vectors" / name for name in ("puzzles", "instructions", "openings")]
    assert joined == [(parts, folder)] and folder == QWEN.work / "vectors" / "three components"
    files = [file.name for file, _ in trained.values()]
    assert files == ["degrade.jsonl", "general_1100.jsonl", "openings.jsonl"]
    steps = [options.get("max_steps", QWEN.steps) for _, options in trained.values()]
    assert steps == [60, 100, 60]
    for words, weakened in zip(said, trained, strict=True):
        assert words[words.index("--aligned_model") + 1] == QWEN.aligned
        assert words[words.index("--degraded_model") + 1] == weakened
        assert words[words.index("--dtype") + 1] == "bfloat16"
    with pytest.raises(SafeGeneError, match="--base"):
        vectors.vector("before alignment", tmp_path, QWEN)
    based = replace(QWEN, base="somewhere")
    vectors.vector("before alignment", tmp_path, based)
    assert said[-1][said[-1].index("--degraded_model") + 1] == "somewhere"


# Order and time


def test_the_most_informative_cells_come_first():
    given = [
        (task, seed, method)
        for seed in (0, 1)
        for task in TASKS
        for method in ("aligned", *methods.METHODS)
        if not (method == "aligned" and seed)
    ]
    found = ordered(given)
    assert sorted(found) == sorted(given)
    first = ("aligned", "fine-tuned", "SafeGene")
    tasks_ = ("poisoned", "sst2", "alpaca")
    assert found[:9] == [(task, 0, method) for task in tasks_ for method in first]
    next_ = ("few-shot LoRA", "uniform λ")
    assert found[9:15] == [(task, 0, method) for task in tasks_ for method in next_]
    tiers = [found.index(c) for c in (("gsm8k", 0, "uniform λ"), ("poisoned", 1, "fine-tuned"))]
    assert 15 <= tiers[0] < tiers[1] < found.index(("poisoned", 0, "RESTA"))
    assert found.index(("boolq", 0, "RESTA")) < found.index(("poisoned", 1, "RESTA"))


def test_seconds_are_expected_by_the_nearest_records(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "WORK", tmp_path)
    folder = tmp_path / "fine-tuned" / "sst2-0"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    found = {
        "a": cell("RESTA", seconds=20.0, method_seconds=5.0),
        "b": cell("RESTA", task="gsm8k", seconds=90.0, method_seconds=9.0),
        "c": cell("fine-tuned", seconds=10.0, method_seconds=0.0, training_seconds=40.0),
        "another family": cell("SafeGene", QWEN.name, seconds=1e6),
        "another device": cell("SafeGene", device="cuda", seconds=1e6),
        "a part of the prompts": cell("RESTA", scale=0.1, seconds=0.1),
    }
    assert expected_seconds(("sst2", 0, "RESTA"), found, SMOLLM2) == 25.0
    # by those of the method; and the fine-tune is not there yet
    assert expected_seconds(("boolq", 0, "RESTA"), found, SMOLLM2) == 62.0 + 40.0
    assert expected_seconds(("boolq", 0, "aligned"), found, SMOLLM2) == 25.0
    assert expected_seconds(("sst2", 0, "SafeGene"), found, SMOLLM2) == 25.0
    assert expected_seconds(("sst2", 0, "SafeGene"), {}, SMOLLM2) == 0.0
    # the method's own seconds, and those of the step's measurement
    measuring = cell("SafeGene", seconds=20.0, about={"measuring_seconds": 7.0})
    assert expected_seconds(("sst2", 0, "SafeGene"), {"a": measuring}, SMOLLM2) == 28.0


def test_a_run_ends_before_a_cell_that_does_not_fit(tmp_path, monkeypatch, capsys):
    measured = {"labels": LABELS, "utility": [1.0], "seconds": 30.0}
    table = SimpleNamespace(scale=1.0, prompts={}, measure=lambda *words: measured)
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(command, "plain", lambda lab, task, seed: ({}, {}))
    monkeypatch.setattr(command, "is_trained", lambda folder: True)
    monkeypatch.setattr(schedule, "is_trained", lambda folder: True)

    def takes_30_seconds(lab, task, seed):
        clock[0] += 30
        return {}, {}

    monkeypatch.setitem(command.ROWS.maps[0], "aligned", takes_30_seconds)
    monkeypatch.setitem(command.ROWS, "RESTA", takes_30_seconds)
    cells = [("sst2", 0, "aligned"), ("sst2", 0, "RESTA"), ("boolq", 0, "RESTA")]
    command.run(table, cells, tmp_path, SMOLLM2, Budget(1.4, 0.0))
    assert list(records.load(CELLS, tmp_path)) == ["sst2-0-aligned", "sst2-0-resta"]
    said = capsys.readouterr().out
    assert "Stopped after 1.0 of 1.4 minutes: boolq-0-resta is expected to take 30 s" in said
    command.run(table, cells, tmp_path, SMOLLM2, None)  # and goes on
    assert next(iter(records.load(CELLS, tmp_path))) == "boolq-0-resta"


def test_rows_that_cannot_be_had_are_named(capsys):
    parser = command._parser()
    words = ["run", "--family", QWEN.name, "--tasks", "sst2", "--seeds", "0", "1", "--methods"]
    arguments = parser.parse_args([*words, "aligned", "SafeMERGE", "RESTA"])
    family = command._family(arguments)
    assert command.wanted(parser, arguments, family) == [
        ("sst2", 0, "aligned"),
        ("sst2", 0, "RESTA"),
        ("sst2", 1, "RESTA"),
    ]
    said = capsys.readouterr().out
    assert "Left out" in said and "SafeMERGE" in said and "--base" in said
    arguments = parser.parse_args([*words, "SafeMERGE", "--base", "b", "--aligned", "models/q"])
    family = command._family(arguments)
    assert family.base == "b" and family.aligned == str(Path("models/q").resolve())
    assert len(command.wanted(parser, arguments, family)) == 2 and not capsys.readouterr().out


# The whole command, on a tiny random model


def test_the_whole_command_on_a_tiny_model(tiny, tmp_path, monkeypatch, capsys):
    quick = partial(methods.tuned_few_shot_update, steps=(1, 2), rates=(1e-3,))
    monkeypatch.setattr(methods, "tuned_few_shot_update", quick)
    rows = ["aligned", "fine-tuned", "SafeGene", "few-shot LoRA, tuned", "one-shot patch"]
    rows += ["LSSF", "WiSE-FT", "WiSE-FT, α = 0.5", "uniform λ", "SafeLoRA"]
    words = ["run", "--family", "tiny", "--data", str(tmp_path / "data"), "--tasks", "sst2"]
    words += ["--seeds", "0", "--scale", "0.05", "--results", str(tmp_path)]
    command.main([*words, "--minutes", "60", "--methods", *rows])
    said = capsys.readouterr()
    assert "SafeLoRA" in said.out, said.err
    found = records.load(CELLS, tmp_path)
    assert len(found) == len(rows) - 1, said.err
    assert all(name.startswith("tiny-sst2-0-") for name in found)
    cells = {record["method"]: record for record in found.values()}
    assert cells["SafeGene"]["device"] == "cpu" and cells["SafeGene"]["dtype"] == "float32"
    assert {record["family"] for record in cells.values()} == {"tiny"}
    assert cells["fine-tuned"]["training"] == {
        "steps": 2,
        "batch_size": 8,
        "learning_rate": 2e-4,
    }
    assert [m for m, record in cells.items() if "training_seconds" in record] == ["fine-tuned"]
    assert cells["WiSE-FT, α = 0.5"]["update"]["norm_ratio"] == pytest.approx(0.5, rel=1e-3)
    assert cells["one-shot patch"]["about"]["steps"] >= 1
    # the step's own report beside what the table found of the same weights
    promised = cells["SafeGene"]["about"]["measured"]
    assert promised["after"]["refusal_rate"]["count"] > 0
    assert cells["SafeGene"]["about"]["measuring_seconds"] > 0
    sides = {(one.run, one.side) for one in promises(tmp_path)}
    assert sides == {("tiny-sst2-0-safegene", side) for side in ("before", "after")}
    assert set(cells["LSSF"]["about"]["ranks"]) <= set(
        SafetyVector.from_pretrained(tiny.work / "vectors" / "puzzles").deltas
    )
    before = (tmp_path / "paper_table.jsonl").read_bytes()
    command.main([*words, "--methods", *rows])
    assert (tmp_path / "paper_table.jsonl").read_bytes() == before
    assert set(load(tmp_path, "tiny")["sst2"]) == set(cells)


def test_what_is_missing_is_said_in_a_sentence(tiny, tmp_path, monkeypatch):
    words = ["run", "--family", "tiny", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="nowhere"):
        command.main([*words, "--aligned", str(tmp_path / "nowhere")])
    (tmp_path / "align.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"prepare\.py"):
        command.main(words)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_an_update_is_added_once_and_taken_off_exactly(tiny, kind):
    table = Lab(None, family=replace(tiny, dtype_on_cpu=kind))
    name = table.linear_modules[0]
    assert str(table.model.dtype) == f"torch.{kind}" and "lm_head" not in table.linear_modules
    before = {key: p.detach().clone() for key, p in table.model.named_parameters()}
    weight = before[f"{name}.weight"]
    update = torch.full_like(weight, 1e-3, dtype=torch.float32)
    with table.updated({name: update}) as model:
        inside = model.get_submodule(name).weight
        assert torch.equal(inside, (weight.float() + update).to(weight.dtype))
    with pytest.raises(RuntimeError), table.updated({name: update, "lm_head": torch.ones(2, 3)}):
        pass
    for key, p in table.model.named_parameters():
        assert torch.equal(p, before[key])


def test_answers_on_a_cpu_are_made_in_float32_of_the_weights_as_they_are(tiny, monkeypatch):
    table = Lab(None, family=replace(tiny, dtype_on_cpu="bfloat16"))
    before = {key: p.detach().clone() for key, p in table.model.named_parameters()}
    seen = []

    def answering(model, *rest):
        seen.extend(p.detach().clone() for p in model.parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.paper_table.lab.generate_answers", answering)
    with pytest.raises(KeyboardInterrupt):
        table.answers([[{"role": "user", "content": "hello"}]], 2, 1)
    for (key, now), then in zip(table.model.named_parameters(), seen, strict=True):
        assert then.dtype == torch.float32 and torch.equal(then.bfloat16(), before[key])
        assert torch.equal(now, before[key])


def test_an_adapter_is_read_on_the_model_that_is_there(tiny, tmp_path):
    adapted = with_lora(make_model())
    adapted.save_pretrained(tmp_path / "adapter")
    table = Lab(None, family=tiny)
    names = [name for name, _ in table.model.named_modules()]
    found, factors = table.update_of(tmp_path / "adapter"), table.factors_of(tmp_path / "adapter")
    name = "model.layers.1.mlp.down_proj"
    layer = adapted.get_submodule(f"base_model.model.{name}")
    torch.testing.assert_close(found[name], layer.get_delta_weight("default"))
    torch.testing.assert_close(factors[name].dense(), found[name])
    assert [name for name, _ in table.model.named_modules()] == names
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SafeGeneError, match="diverged"):
        table.update_of(tmp_path / "adapter")
