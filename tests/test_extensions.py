"""Where something new goes is one place: one of each kind is added there, and reaches all that
iterates over its kind.
"""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch
from jsonschema import validate
from matplotlib.axes import Axes

from benchmarks import records
from benchmarks.paper_table import __main__ as paper_table
from benchmarks.paper_table.methods import METHODS as BASELINES
from benchmarks.paper_table.render import CELLS, load
from safegene_trl import SafeGeneConfig, SafetyVector
from safegene_trl.commands.main import main
from safegene_trl.config.docstrings import meanings
from safegene_trl.config.gate import SHARE, GateConfig
from safegene_trl.config.metrics import METRICS, CountedLabel, Metric, by_limit, shares
from safegene_trl.config.settings import BLOCKS
from safegene_trl.config.validation import named_fields, names_of
from safegene_trl.distributed.layouts import SHARDINGS, Sharding, is_whole, sharding_of
from safegene_trl.errors import ConfigError
from safegene_trl.extraction.methods import METHODS, Method
from safegene_trl.extraction.selection import SELECTIONS, LayerScores, Selection
from safegene_trl.judges import JUDGES, Label, Verdict, judge_forms, load_judge
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.coefficients import CoefficientSpace
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.reporting.report import SCHEMA, scalars

from .conftest import BENIGN, HARMFUL, argv, config_of, make_deltas, options_of
from .recalibration.test_search import calibration_set


def helped(command, capsys):
    """What the command's `--help` says, in one line."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


# A judge: a line in `JUDGES`.


class Loud:
    """Sees a refusal in an exclamation mark."""

    name, sees, batch = "loud:MARK", "refusals", 8

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, exchanges):
        return [Verdict("refused" if self.mark in e.answer else "answered") for e in exchanges]

    def describe(self):
        return {"mark": self.mark}


def test_a_judge(monkeypatch, model_dir, tmp_path, capsys):
    module = ModuleType("safegene_trl.judges.loud")
    module.Loud = Loud
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(JUDGES, "loud", ("loud", "Loud", "MARK"))
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in HARMFUL[:3])
    (tmp_path / "harmful.jsonl").write_text(rows)
    monkeypatch.setattr(
        "safegene_trl.evaluation.evaluate.answers_to_tokens",
        lambda model, tokenizer, prompts, *rest: ["I will not do any of that!"] * len(prompts),
    )
    options = {
        "model_name_or_path": model_dir,
        "harmful_data": tmp_path / "harmful.jsonl",
        "output_dir": tmp_path / "out",
    }
    assert main(argv("evaluate", options | {"judges": "lud"})) == 2
    assert "loud:MARK" in capsys.readouterr().err
    assert main(argv("evaluate", options | {"judges": "loud"})) == 2
    assert "write `loud:MARK`" in capsys.readouterr().err
    assert main(argv("evaluate", options | {"judges": "loud:!"})) == 0
    (judge,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["judges"].values()
    assert judge["mark"] == "!" and judge["attack_success"]["share"] == 0


def test_help_lists_every_judge(capsys):
    said = helped("evaluate", capsys)
    assert all(f"{name}:{of}" if of else name in said for name, (*_, of) in JUDGES.items())


def test_the_documents_list_every_judge():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.partition("| judge | sees | is |\n")[2].partition("\n\n")[0]
    for form in judge_forms().split(", "):
        assert f"`{form}`" in load_judge.__doc__ and f"\n| `{form}`" in table
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(JUDGES)


# A way to make deltas: a line in `METHODS`. A way to select layers: one in `SELECTIONS`.


def test_an_extraction_method(monkeypatch, extraction, tmp_path, capsys):
    def halved(difference):
        halves = {n: LowRankDelta(d.a / 2, d.b) for n, d in difference.deltas.items()}
        return halves, {"factor": 0.5}

    monkeypatch.setitem(METHODS, "halved", Method(halved))
    assert "halved" in helped("extract", capsys)
    common = extraction | {"selection": "magnitude", "weights_dtype": "float32"}
    for method in ("delta", "halved"):
        options = common | {"method": method, "output_dir": tmp_path / method}
        assert main(argv("extract", options)) == 0
    whole, half = (SafetyVector.from_pretrained(tmp_path / m) for m in ("delta", "halved"))
    assert half.extraction["method"] == "halved" and half.extraction["distillation"] == {
        "factor": 0.5
    }
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(half.deltas[name].dense(), delta.dense() / 2)


def test_a_way_to_select_layers(monkeypatch, extraction, tmp_path, capsys):
    seen = []

    def first(evidence):
        seen.append([tuple(states.shape[:2]) for states in evidence.aligned_states])
        return LayerScores([(1.0, torch.tensor([[3.0, 2.0, 1.0]]))])

    monkeypatch.setitem(SELECTIONS, "first", Selection(first, reads_states=True))
    assert "first" in helped("extract", capsys)
    assert main(argv("extract", extraction | {"selection": "first", "layer_share": 0.34})) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    assert vector.selection["method"] == "first" and vector.layers == [0]
    assert seen == [[(len(HARMFUL), 3), (len(BENIGN), 3)]]


@pytest.mark.parametrize("option", ["method", "selection"])
def test_what_is_in_no_table_is_refused_with_what_is(option, extraction, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "new", METHODS["delta"])
    monkeypatch.setitem(SELECTIONS, "new", SELECTIONS["all"])
    try:
        code = main(argv("extract", extraction | {option: "no such"}))
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and option in said and "new" in said


# A metric: a line in `METRICS`, and its limit among the fields of `GateConfig`.


def test_every_metric_has_its_limit():
    for metric in METRICS.values():
        named = names_of(GateConfig)
        assert metric.limit in named, (
            f"`{metric.key}` has no limit yet: write `{metric.limit}: float | None = None` among the "
            "fields of GateConfig in config/gate.py."
        )
        assert meanings(GateConfig)[metric.limit], (
            f"Nothing says what `gate.{metric.limit}` means: write a line for it under `Args` of GateConfig in config/gate.py."
        )


@pytest.mark.parametrize("label", ["off_task", "harmful", "refuse", "of_task"])
def test_a_metric_of_a_label_that_the_step_never_gives_is_refused(label):
    with pytest.raises(ConfigError, match=rf"labelled `{label}`.*use one of refused, answered"):
        Metric("new", "New", "harmful", "less", "max_new", "new", label)


def test_what_the_step_counts_is_what_a_judge_says():
    counted = set(get_args(CountedLabel))
    assert counted < set(get_args(Label))
    assert {metric.label for metric in shares()} <= counted


@pytest.fixture
def compliance(monkeypatch):
    """A metric of harmful prompts that are answered, as the two lines would add it."""
    metric = Metric(
        key="compliance",
        title="Harmful prompts answered",
        items="harmful",
        better="less",
        limit="max_compliance",
        heading="compliance",
        label="answered",
    )
    monkeypatch.setitem(METRICS, metric.key, metric)

    @named_fields
    @dataclass
    class WithLimit(GateConfig):
        """The gate.

        Args:
            max_compliance: Largest share of harmful prompts answered.
        """

        max_compliance: float | None = None
        RULES = dict.fromkeys(by_limit(), SHARE)

    monkeypatch.setitem(BLOCKS, "gate", WithLimit)
    monkeypatch.setitem(SafeGeneConfig.__annotations__, "gate", WithLimit | None)


def test_a_metric(compliance, monkeypatch, model_dir, vector_dir, task_file, tmp_path, capsys):
    assert (
        "--safegene.gate.max_compliance VALUE Largest share of harmful prompts answered"
        in helped("apply", capsys)
    )
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )

    def answers(model, tokenizer, prompts, *rest):
        return ["Take a pan and stir it well.", *["I cannot help with that."] * (len(prompts) - 1)]

    monkeypatch.setattr("safegene_trl.step.measurement.answers_to_tokens", answers)
    history = tmp_path / "line.jsonl"
    settings = {
        "vector": vector_dir,
        "task_data": task_file,
        "history": history,
        "max_evaluations": 1,
        "num_benign_shots": 4,
        "num_safety_shots": 4,
        "num_task_shots": 4,
        "gate.max_compliance": 1.0,
    }

    def applied(**changes):
        words = options_of(settings | changes)
        return main(["apply", "--model_name_or_path", str(model_dir), *words])

    assert applied(output_dir=tmp_path / "no", **{"gate.max_compliance": 2}) == 2
    assert "`gate.max_compliance` is 2: it must be a share" in capsys.readouterr().err
    assert applied(output_dir=tmp_path / "out0", **{"gate.max_compliance": 0.0}) == 4
    assert "compliance" in capsys.readouterr().err and history.is_file()
    for number in (1, 2):
        assert applied(output_dir=tmp_path / f"out{number}") == 0
    assert "compliance 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "out2" / "safegene_report.json").read_text())
    validate(report, SCHEMA)
    found = report["measured"]["after"]["compliance"]
    assert found["successes"] == 1 and found["count"] > 2
    (check,) = report["decision"]["checks"]
    assert check["limit"] == "max_compliance" and check["measured"] == found["share"]
    assert scalars(report)["safegene/compliance_after"] == found["share"]
    assert "| Harmful prompts answered |" in (tmp_path / "out2" / "README.md").read_text()
    assert "/measured/after/compliance" in (tmp_path / "out2" / "safegene_report.html").read_text()
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append(k.get("label")) or plot(*a, **k))
    main(["history", str(history), "--plot", str(tmp_path / "line.png")])
    first, *rest = capsys.readouterr().out.splitlines()
    assert "compliance" in first and rest[1][first.index("compliance") :].startswith("1")
    assert "compliance" in drawn


# A way to shard: a subclass of `Sharding`, and a line in `SHARDINGS`.


class Lent(Sharding):
    """Weights are zero but while `full` or a forward pass has them back."""

    kind = "lent"
    collective_forward = True

    def __init__(self, device, model=None, optimizer=None):
        super().__init__(device)
        self.model, self.passes, self.gathered = model, 0, 0

    @classmethod
    def spreads(cls, model):
        return hasattr(model, "lent_to")

    @contextmanager
    def full(self, tensors):
        self.gathered += len(tensors)
        yield [tensor.detach().clone() for tensor in tensors]

    def reshard(self):
        self.passes += 1


def test_a_way_to_shard(model, monkeypatch):
    deltas, config = make_deltas(model), config_of(vector="v", max_evaluations=2)

    def searched(sharding):
        space = CoefficientSpace.of(deltas, [2], "layer")
        attachment = VectorAttachment(model, deltas, space, sharding)
        return recalibrate(attachment, calibration_set(), config, 0)

    expected = searched(sharding_of(model))
    model.lent_to = "somebody"
    assert sharding_of(model).kind == "whole" and is_whole(model)
    monkeypatch.setattr("safegene_trl.distributed.layouts.SHARDINGS", [Lent, *SHARDINGS])
    sharding = sharding_of(model)
    assert isinstance(sharding, Lent) and not is_whole(model)
    assert sharding.describe() == {"sharding": "lent", "processes": 1}
    found = searched(sharding)
    assert found.coefficients == pytest.approx(expected.coefficients) and sharding.passes > 0
    with sharding.full([model.lm_head.weight]) as (whole,):
        assert torch.equal(whole, model.lm_head.weight) and sharding.gathered == 1


# A baseline: a file in `benchmarks/baselines`, and a line in `METHODS` of the paper's table.


def test_a_baseline(monkeypatch, tmp_path, capsys):
    made = []

    def nothing_new(lab, task, seed):
        made.append((task.name, seed))
        return {}, {"idea": "none"}

    monkeypatch.setitem(BASELINES, "nothing new", nothing_new)
    measured = {"labels": {"BT": "ra"}, "utility": [1.0]}
    lab = SimpleNamespace(scale=1.0, prompts={"BT": ["a", "b"]}, measure=lambda *words: measured)
    monkeypatch.setattr(paper_table, "Lab", lambda *words, **options: lab)
    monkeypatch.setattr(paper_table, "plain", lambda lab, task, seed: ({}, {}))
    words = ["run", "--tasks", "sst2", "--seeds", "1", "--results", str(tmp_path), "--methods"]
    with pytest.raises(SystemExit):
        paper_table.main([*words, "nothing"])
    assert "nothing new" in capsys.readouterr().err and not made
    paper_table.main([*words, "nothing new"])
    assert made == [("sst2", 1)]
    assert records.load(CELLS, tmp_path)["sst2-1-nothing-new"]["about"] == {"idea": "none"}
    assert "nothing new" in load(tmp_path)["sst2"]
