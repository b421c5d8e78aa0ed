"""The files of a fault, the commands that are broken, and what a run without a fault leaves."""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from safegene_trl.commands.main import main as safegene

from ..conftest import in_groups, make_model, make_tokenizer, make_vector, task_dataset


MARKER = "safegene_report.json"
JOBS = ("apply", "coefficients", "sft", "fleet")
HANGS_AFTER = 90.0  # seconds
CRASHED = 99  # exit code of a run that ends by an exception which is no SafeGeneError


@dataclass
class Reference:
    """What a run of one job without a fault leaves."""

    code: int
    targets: list[dict[str, str]]
    listing: set[str]
    plain: dict[str, str] = field(default_factory=dict)


class World:
    """A fine-tune, a vector, another one, task data, and where checkpoints are to go."""

    def __init__(self, root: Path):
        self.root = root
        self.model, self.vector, self.other = root / "model", root / "vector", root / "other-vector"
        self.output = root / "results"
        tokenizer, model = make_tokenizer(), make_model()
        model.save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        make_vector(model, tokenizer).save_pretrained(self.vector)
        make_vector(model, tokenizer, seed=8).save_pretrained(self.other)
        self.vector_files = {file.name: file.read_bytes() for file in self.vector.iterdir()}
        self.history = self.output / "history.jsonl"
        self.task = root / "task.jsonl"
        self.task.write_text("".join(json.dumps(row) + "\n" for row in task_dataset()))
        self.fleet = root / "models.yaml"
        members = [{"model_name_or_path": str(self.model), "name": name} for name in "ab"]
        content = {
            "output_dir": str(self.output),
            "processes": 2,
            "memory_gib": 64,
            "models": members,
        }
        self.fleet.write_text(yaml.safe_dump(content | {"safegene": in_groups(self._settings())}))

    def _settings(self) -> dict[str, Any]:
        found = {
            "vector": str(self.vector),
            "task_data": str(self.task),
            "max_evaluations": 2,
            "num_safety_shots": 4,
        }
        found |= {
            "num_task_shots": 4,
            "num_benign_shots": 0,
            "num_test_prompts": 1,
            "max_new_tokens": 1,
        }
        found |= {"max_utility_loss": 1000.0, "utility_weight": 0.0, "max_shard_size": "60KB"}
        # whether a random vector helps is chance: every outcome is written
        return found | {"gate": {"max_incoherent": 0.0, "write_rejected": True}}

    def targets(self, job: str) -> list[Path]:
        return [self.output / name for name in (("a", "b") if job == "fleet" else ("safeguarded",))]

    def command(self, job: str) -> list[str]:
        if job == "fleet":
            return ["apply", "--fleet", str(self.fleet)]
        settings = self._settings() | {
            "output_dir": str(self.targets(job)[0]),
            "history": str(self.history),
        }
        if job == "coefficients":  # nothing is measured that limits could be held against
            del settings["gate"]
        words = [
            "--safegene",
            json.dumps(in_groups(settings)),
            "--model_name_or_path",
            str(self.model),
        ]
        if job == "coefficients":
            return ["apply", *words, "--coefficients", "0.5"]
        if job == "apply":
            return ["apply", *words]
        data = json.dumps({"path": "json", "data_files": str(self.task), "split": "train"})
        recipe = self.root / "recipe.yaml"
        recipe.write_text(
            f"datasets: [{data}]\noutput_dir: {self.output}\nmax_steps: 1\nper_device_train_batch_size: 2\n"
            "learning_rate: 1.0e-2\nuse_cpu: true\nbf16: false\ngradient_checkpointing: false\nsave_strategy: 'no'\n"
            "report_to: none\ndisable_tqdm: true\ndtype: float32\n"
        )
        return ["sft", "--config", str(recipe), *words]

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        self.restore_vector()

    def restore_vector(self) -> None:
        for file in self.vector.iterdir():
            if file.name not in self.vector_files:
                file.unlink()
        for name, data in self.vector_files.items():
            (self.vector / name).write_bytes(data)

    def warm_up(self, jobs: tuple[str, ...]) -> None:
        """Runs every job but the fleet in this process, so that no fork imports anything: five
        times as fast.
        """
        for job in jobs:
            self.clear()
            if job != "fleet":
                with (
                    open(os.devnull, "w") as silence,
                    redirect_stdout(silence),
                    redirect_stderr(silence),
                ):
                    safegene(self.command(job))
        gc.collect()
        gc.freeze()

    def reference(self, job: str) -> Reference:
        """Runs the job on an empty output."""
        self.clear()
        code = run(self.command(job), lambda: None)
        targets = [contents(target) for target in self.targets(job)]
        whole = [finished(target) for target in self.targets(job)]
        if code is None or code not in (0, 3, 4) or not all(whole):
            raise RuntimeError(
                f"{job} ended with {code} without a fault: see it with FAULTS_DEBUG=1"
            )
        listing = {path.name for path in self.output.iterdir()}
        return Reference(code, targets, listing, weights(self.output) if job == "sft" else {})


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all that decides what a checkpoint is; its reports hold times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(Path(MARKER).stem)
    }


def weights(folder: Path) -> dict[str, str]:
    """Hashes of the weight files right in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def finished(folder: Path) -> bool:
    """Whether it is a checkpoint with its report."""
    try:
        return json.loads((folder / MARKER).read_text())["status"] == "safeguarded"
    except (OSError, ValueError, KeyError):
        return False


def run(command: list[str], prepare: Callable[[], None]) -> int | None:
    """The command in a child process; its exit code, negative for a signal, None for a hang (it is
    ended then).
    """
    child = fork(lambda: safegene(command), prepare)
    return wait(child, HANGS_AFTER)


def fork(work: Callable[[], int], prepare: Callable[[], None] = lambda: None) -> int:
    """Runs `work` in a child process, where nothing has to be imported anew; the process's id."""
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        if not os.environ.get("FAULTS_DEBUG"):
            os.dup2(silence, 2)
        subprocess.Popen = ForkedProcess  # type: ignore[misc]
        prepare()
        code = work()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """A child's exit code; None where it had to be ended."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


class ForkedProcess(subprocess.Popen):
    """A member of a fleet as a fork of this process instead of a new interpreter, which would take
    seconds to start.
    """

    def __init__(self, args: Any, *rest: Any, **options: Any):
        own = isinstance(args, list) and list(args[:3]) == [sys.executable, "-m", "safegene_trl"]
        if not own:
            super().__init__(args, *rest, **options)
            return

        def prepare() -> None:
            if options.get("start_new_session"):
                os.setsid()
            if options.get("process_group") is not None:
                os.setpgid(0, options["process_group"])
            if options.get("preexec_fn"):
                options["preexec_fn"]()
            os.environ.update(options.get("env") or {})
            if hasattr(options.get("stdout"), "fileno"):
                os.dup2(options["stdout"].fileno(), 1)
                os.dup2(options["stdout"].fileno(), 2)

        self.args, self.returncode, self._forked = args, None, True
        self.stdin = self.stdout = self.stderr = None
        self.pid = fork(lambda: safegene(list(args[3:])), prepare)

    def poll(self) -> int | None:
        if not getattr(self, "_forked", False):
            return super().poll()
        if self.returncode is None:
            try:
                done, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                done, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not getattr(self, "_forked", False):
            return super().wait(timeout)
        deadline = time.monotonic() + (HANGS_AFTER if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or HANGS_AFTER)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if not getattr(self, "_forked", False):
            super().send_signal(sig)
        elif self.poll() is None:
            os.kill(self.pid, sig)

    def __del__(self, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "_forked", False):
            super().__del__()
