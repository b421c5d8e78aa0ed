"""Before every stage of the quickstart stands a line that says what it does and how long that
takes.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from safegene_trl import SafeGeneCallback

from ..test_callback import sft


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script's names, with what it works on replaced; every stage prints that it has begun."""
    found = runpy.run_path(str(SCRIPT))
    report = {"decision": {"outcome": "accepted"}, "phases": {"recalibrate": {"seconds": 1.0}}}
    shares = {"refused": 0.5, "answered": 0.5, "accuracy": 0.5}
    shares |= {"intervals": dict.fromkeys(shares, (0.25, 0.75)), "seconds": 1.0}
    inside = found["main"].__globals__
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: print("RUN prepare"))
    monkeypatch.setitem(inside, "fine_tune", lambda short: print("RUN fine-tune") or report)
    monkeypatch.setitem(inside, "measure", lambda *args: print("RUN measure") or shares)
    monkeypatch.setitem(inside, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--short"])
    return found


def test_every_stage_is_announced_before_it_begins(script, tmp_path, capsys):
    script["main"]()
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("[", "RUN", "      the"))
    ]
    assert [line[:5] for line in lines[:5]] == ["[1/4]", "RUN p", "[2/4]", "RUN f", "[4/4]"]
    assert [line for line in lines if line.startswith("RUN")][2:] == ["RUN measure"] * 3
    assert all("minute" in line or "seconds" in line for line in lines if line.startswith("["))
    assert set(json.loads((tmp_path / "table.json").read_text())) == {
        "aligned",
        "fine-tuned",
        "safeguarded",
    }


def test_the_short_form_says_what_it_does_and_does_not_show(script, capsys, monkeypatch):
    script["main"]()
    short = capsys.readouterr().out
    assert "3 batches of drug reviews, less than a minute" in short and "on 4 prompts" in short
    assert "up to 3 minutes" not in short and "two minutes" not in short
    assert "show that it runs, and not what it achieves" in short.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    script["main"]()
    whole = capsys.readouterr().out
    assert "25 batches of drug reviews, up to 3 minutes: refusals are lost on the way." in whole
    assert "on 60 prompts" in whole and "up to two minutes for each model." in whole
    assert whole.count("50% (25%–75%)") == 9
    assert "short form" not in whole
    assert all("safegene demo /" in each for each in (short, whole))


def test_the_safety_step_is_announced_where_the_training_ends(
    script, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(SafeGeneCallback, "on_train_begin", lambda *args, **kwargs: None)
    monkeypatch.setattr(SafeGeneCallback, "on_train_end", lambda *args, **kwargs: print("RUN step"))
    for event in ("on_init_end", "on_step_begin"):
        monkeypatch.setattr(SafeGeneCallback, event, lambda *args, **kwargs: None)
    step = SafeGeneCallback.__new__(SafeGeneCallback)
    sft(tmp_path / "out", [script["SayWhatFollows"](short=True), step], tokenizer).train()
    printed = capsys.readouterr().out
    assert 0 <= printed.index("[3/4] The safety step") < printed.index("RUN step")
