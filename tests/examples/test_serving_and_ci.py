"""The example of serving, and the workflow: its options are ones that the command has."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from safegene_trl.commands.main import COMMANDS
from safegene_trl.config.gate import GateConfig
from safegene_trl.config.settings import SafeGeneConfig


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_checkpoint_is_asked(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["serve.py", str(model_dir), "sort item 1", "--max_new_tokens", "3"]
    )
    runpy.run_path(str(EXAMPLES / "serve.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_options_of_the_workflow_are_known():
    text = (EXAMPLES / "github_workflow.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["release"]["steps"]
    runs = "\n".join(step.get("run", "") for step in steps)
    assert set(re.findall(r"safegene (\w+) ", runs)) <= set(COMMANDS)
    keys = dict.fromkeys(re.findall(r"--safegene\.output\.(\w+)", runs), "x")
    assert set(keys) == {"history", "hub_model_id"} and "--safegene.dry_run " in runs
    assert SafeGeneConfig.from_dict({"vector": "v", "output": keys})
    gate = re.findall(r"--safegene\.gate\.(\w+) ([\d.]+)", runs)
    assert len(GateConfig(**{key: float(value) for key, value in gate}).limits) == 3


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_says_how_it_is_run(script):
    assert re.search(
        r'^"""[^"]*(python examples/|make quickstart)', (EXAMPLES / script).read_text()
    )
