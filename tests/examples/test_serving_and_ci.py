"""The example of serving, and those of pipelines: their options are ones that the commands have, and
their scripts end as the gate says.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from safegene_trl.commands.main import COMMANDS
from safegene_trl.config.gate import GateConfig
from safegene_trl.config.settings import SafeGeneConfig
from safegene_trl.step.decision import EXIT_CODES


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = [path.stem for path in (EXAMPLES.parent / "safegene_trl/accelerate_configs").iterdir()]


def test_a_checkpoint_is_asked(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["serve.py", str(model_dir), "sort item 1", "--max_new_tokens", "3"]
    )
    runpy.run_path(str(EXAMPLES / "serve.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def github():
    steps = yaml.safe_load((EXAMPLES / "github_workflow.yml").read_text())["jobs"]["release"]
    return "\n".join(step.get("run", "") for step in steps["steps"])


def gitlab():
    jobs = yaml.safe_load((EXAMPLES / "gitlab_ci.yml").read_text())
    scripts = [
        line
        for job in jobs.values()
        if isinstance(job, dict)
        for part in ("before_script", "script", "after_script")
        for line in job.get(part, [])
    ]
    return "\n".join(scripts)


def kubernetes():
    job = yaml.safe_load((EXAMPLES / "kubernetes_job.yaml").read_text())
    return job["spec"]["template"]["spec"]["containers"][0]["args"][0]


def slurm():
    return (EXAMPLES / "slurm_job.sh").read_text()


@pytest.mark.parametrize("pipeline", [github, gitlab, kubernetes, slurm])
def test_options_of_a_pipeline_are_known(pipeline):
    runs = pipeline()
    commands = set(re.findall(r"safegene (\w+) ", runs))
    assert {"sft"} <= commands <= set(COMMANDS)
    keys = dict.fromkeys(re.findall(r"--safegene\.output\.(\w+)", runs), "x")
    assert "history" in keys and SafeGeneConfig.from_dict({"vector": "v", "output": keys})
    gate = re.findall(r"--safegene\.gate\.(\w+) ([\d.]+)", runs)
    limits = GateConfig(**{key: float(value) for key, value in gate}).limits
    assert "min_refusal_rate" in limits
    for config in re.findall(r"--accelerate_config (\w+)", runs):
        assert config in CONFIGS


@pytest.mark.parametrize("pipeline", [kubernetes, slurm])
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 4), (2, 2)])
def test_a_script_ends_as_the_gate_says(pipeline, code, expected, tmp_path):
    """With a `safegene` that does nothing else; a history that warns of drift ends nothing."""
    command = tmp_path / "safegene"
    command.write_text(f'#!/bin/sh\necho "$1" >> asked\n[ "$1" = sft ] && exit {code}\nexit 3\n')
    command.chmod(0o755)
    named = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LINE": str(tmp_path), "SLURM_JOB_ID": "1"}
    shell = "bash" if pipeline is slurm else "sh"
    done = subprocess.run([shell, "-c", pipeline()], cwd=tmp_path, env=named, timeout=30)
    assert done.returncode == expected
    assert (tmp_path / "asked").read_text().split()[0] == "sft"


def test_a_rejected_job_is_not_tried_again():
    """The pipelines' own words for exit codes."""
    job = yaml.safe_load((EXAMPLES / "kubernetes_job.yaml").read_text())
    failing = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert set(failing) == {EXIT_CODES["rejected"], 2}
    jobs = yaml.safe_load((EXAMPLES / "gitlab_ci.yml").read_text())
    allowed = jobs["fine-tune and safeguard"]["allow_failure"]["exit_codes"]
    assert allowed == [EXIT_CODES["accepted_best_effort"]]


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_says_how_it_is_run(script):
    assert re.search(
        r'^"""[^"]*(python examples/|make quickstart)', (EXAMPLES / script).read_text()
    )
