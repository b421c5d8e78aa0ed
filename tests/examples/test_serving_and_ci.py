"""The example of serving, and those of pipelines: their options are ones that the commands have, and
their scripts end as the gate says.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
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


def github_job():
    return yaml.safe_load((EXAMPLES / "github_workflow.yml").read_text())["jobs"]["release"]


def github():
    return "\n".join(step.get("run", "") for step in github_job()["steps"])


def github_step(name):
    """The script of one step, as a runner calls it."""
    (found,) = [step["run"] for step in github_job()["steps"] if step.get("name") == name]
    return f"set -e\n{found}"


def release_on_github():
    return github_step("Fine-tune and safeguard")


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


def called(pipeline, folder):
    """How a pipeline calls its script, with what it sets and the `safegene` of a folder."""
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LINE": str(folder / "line"),
        "SLURM_JOB_ID": "1",
        "GITHUB_RUN_ID": "1",
    }
    shell = "sh" if pipeline is kubernetes else "bash"
    return [shell, "-c", pipeline()], {"cwd": folder, "env": environment}


def stand_in(folder, script):
    """A `safegene` that does this, and writes down what it was asked."""
    command = folder / "safegene"
    command.write_text(f'#!/bin/sh\necho "$@" >> asked\n{script}\n')
    command.chmod(0o755)


@pytest.mark.parametrize("pipeline", [kubernetes, slurm, release_on_github])
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 4), (2, 2)])
def test_a_script_ends_as_the_gate_says(pipeline, code, expected, tmp_path):
    """With a `safegene` that does nothing else; a history that warns of drift ends nothing."""
    stand_in(tmp_path, f'[ "$1" = sft ] && exit {code}; exit 3')
    words, options = called(pipeline, tmp_path)
    done = subprocess.run(words, **options, timeout=30)
    assert done.returncode == expected
    assert (tmp_path / "asked").read_text().split()[0] == "sft"


@pytest.mark.parametrize("pipeline", [kubernetes, slurm])
@pytest.mark.parametrize(("code", "expected"), [(143, 143), (3, 0)])
def test_a_script_passes_the_signal_on(pipeline, code, expected, tmp_path):
    """To the step, which says what it was at, and for whose end the script waits."""
    told = f"trap 'sleep 0.2; echo > told; exit {code}' TERM"
    waiting = "echo > begun; for i in $(seq 200); do sleep 0.05; done"
    stand_in(tmp_path, f'[ "$1" = sft ] || exit 0\n{told}\n{waiting}')
    words, options = called(pipeline, tmp_path)
    script = subprocess.Popen(words, **options)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.02)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=30) == expected
    finally:
        script.kill()
    assert (tmp_path / "told").exists()


def test_slurm_signals_the_script():
    """By default all that `srun` has started, which is nothing here, and not the script."""
    subprocess.run(["bash", "-n", EXAMPLES / "slurm_job.sh"], check=True, timeout=30)
    head = slurm().partition("set -euo pipefail")[0]
    assert re.findall(r"^#SBATCH --signal=(.*)$", head, re.MULTILINE) == ["B:TERM@120"]
    assert "srun " not in slurm().replace(head, "")


def test_the_line_outlives_a_checkout_on_github(tmp_path):
    """Which removes all from the workspace that is not in git."""
    assert Path(github_job()["env"]["LINE"]).is_absolute()
    stand_in(tmp_path, "exit 0")
    (tmp_path / "line").mkdir()
    for name in ("Check everything before the GPU hours", "Fine-tune and safeguard"):
        words, options = called(lambda name=name: github_step(name), tmp_path)
        subprocess.run(words, **options, check=True, timeout=30)
    for asked in (tmp_path / "asked").read_text().splitlines():
        places = re.findall(r"--(?:safegene\.output\.history|output_dir) (\S+)", asked)
        assert places == [f"{tmp_path}/line/out-1", f"{tmp_path}/line/history.jsonl"]
    uploaded = github_job()["steps"][-1]["with"]["path"].split("\n")[:-1]
    assert all(place.startswith("${{ env.LINE }}/") for place in uploaded)


@pytest.mark.parametrize(
    ("code", "expected", "warns"), [(0, 0, False), (2, 2, False), (3, 0, True)]
)
def test_drift_is_what_one_exit_code_means(code, expected, warns, tmp_path):
    """A history that cannot be read is none."""
    stand_in(tmp_path, f"exit {code}")
    words, options = called(lambda: github_step("Watch for drift"), tmp_path)
    options |= {"capture_output": True, "text": True, "timeout": 30}
    assert subprocess.run(words, **options).returncode == 0  # nothing was released yet
    assert not (tmp_path / "asked").exists()
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "history.jsonl").touch()
    done = subprocess.run(words, **options)
    assert done.returncode == expected and ("::warning::" in done.stdout) == warns


def test_the_line_outlives_a_failed_job_on_gitlab():
    """As jobs that end as best effort or rejected are."""
    job = yaml.safe_load((EXAMPLES / "gitlab_ci.yml").read_text())["fine-tune and safeguard"]
    assert job["cache"]["when"] == "always"
    (history,) = re.findall(r"--safegene\.output\.history (\S+)", "\n".join(job["script"]))
    assert f"{Path(history).parent}/" in job["cache"]["paths"]


def test_a_rejected_job_is_not_tried_again():
    """The pipelines' own words for exit codes."""
    job = yaml.safe_load((EXAMPLES / "kubernetes_job.yaml").read_text())
    evicted, failing = job["spec"]["podFailurePolicy"]["rules"]
    assert set(failing["onExitCodes"]["values"]) == {EXIT_CODES["rejected"], 2}
    # the first rule that fits holds
    assert evicted["action"] == "Ignore" and failing["action"] == "FailJob"
    jobs = yaml.safe_load((EXAMPLES / "gitlab_ci.yml").read_text())
    allowed = jobs["fine-tune and safeguard"]["allow_failure"]["exit_codes"]
    assert allowed == [EXIT_CODES["accepted_best_effort"]]


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_says_how_it_is_run(script):
    assert re.search(
        r'^"""[^"]*(python examples/|make quickstart)', (EXAMPLES / script).read_text()
    )
