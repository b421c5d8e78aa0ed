"""The metrics in TensorBoard, MLflow, wandb and Trackio: in the run of the fine-tune, read back
from what each has written.
"""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.recalibration import search as recalibration
from safegene_trl.reporting.report import scalars

from .conftest import config_of, make_model, make_tokenizer, task_dataset


def train(folder, vector):
    """One fine-tune with four trackers, in a process of its own: they read their settings at
    import. Writes the metrics to a file.
    """
    recalibration.objection = lambda before, after, budget: ""
    settings = config_of(
        vector=vector,
        max_utility_loss=100.0,
        utility_weight=0.0,
        max_evaluations=2,
        num_test_prompts=4,
    )
    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(
            output_dir=f"{folder}/out",
            max_steps=2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to=["tensorboard", "mlflow", "wandb", "trackio"],
        ),
        train_dataset=task_dataset(),
        processing_class=make_tokenizer(),
    )
    callback = SafeGeneCallback(settings).attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback.attach(trainer)) == 1
    trainer.train()
    Path(folder, "metrics.json").write_text(json.dumps(scalars(callback.report)))


@pytest.fixture
def trained(tmp_path, vector_dir):
    environment = {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_EXPERIMENT_NAME": "line",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
        "OMP_NUM_THREADS": "1",
    }
    script = f"from tests.test_trackers import train; train({str(tmp_path)!r}, {str(vector_dir)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path, json.loads((tmp_path / "metrics.json").read_text())


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    found.Reload()
    return {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}, len(
        list(folder.rglob("events.*"))
    )


def mlflow(folder):
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(folder.as_uri())
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    return dict(runs[0].data.metrics), len(runs)


def log_records(data, begin=7, block=32768):
    """Records of LevelDB's log format: chunks with checksum, length and kind (whole, first, middle,
    last) in blocks.
    """
    position, record = 0, b""
    while position + 7 <= len(data):
        left = block - (position + begin) % block
        if left < 7:
            position += left
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb(folder):
    from wandb.proto import wandb_internal_pb2

    files = [file for file in folder.rglob("run-*.wandb") if not file.parent.is_symlink()]
    found = {}
    for data in log_records(files[0].read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found, len(files)


def trackio(folder):
    (file,) = folder.glob("*.db")
    found, runs = {}, set()
    with sqlite3.connect(file) as connection:
        for run, metrics in connection.execute("select run_name, metrics from metrics order by id"):
            found |= json.loads(metrics)
            runs.add(run)
    return found, len(runs)


def test_metrics_are_in_the_run_of_the_fine_tune(trained):
    folder, expected = trained
    assert expected["safegene/outcome"] == 2 and "safegene/refusal_rate_after" in expected
    for read, place, prefix in (
        (tensorboard, "tensorboard", "train/"),
        (mlflow, "mlflow", ""),
        (wandb, "wandb", "train/"),
        (trackio, "trackio", "train/"),
    ):
        found, runs = read(folder / place)
        assert runs == 1, place
        assert f"{prefix}loss" in found, place  # the training's own
        for name, value in expected.items():
            assert found[f"{prefix}{name}"] == pytest.approx(value, rel=1e-5), (place, name)


def test_names_and_outcomes():
    assert scalars({"phases": {}, "error": {}}) == {"safegene/outcome": -1.0}
    report = {
        "decision": {"outcome": "rejected"},
        "coefficients": {"layers.1": 0.5, "layers.2": 1.5},
    }
    assert scalars(report) == {
        "safegene/outcome": 0.0,
        "safegene/mean_coefficient": 1.0,
        "safegene/largest_coefficient": 1.5,
    }
