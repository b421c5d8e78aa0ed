"""Files that are not ours are found, whatever they are; those that a checkpoint or vector has are
known.
"""

import json
import shutil

import pytest

from safegene_trl.checkpoints.adapter_output import save_adapter
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.contents import (
    CHECKPOINT,
    MARKER,
    TOUCH_UP,
    VECTOR,
    check_replaceable,
    foreign_file,
)
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.errors import OutputError

from ..conftest import ALONE, make_deltas, make_model


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """One in several files, with an adapter in a subfolder and all reports; of a version that kept
    no record.
    """
    folder, model = tmp_path / "checkpoint", make_model()
    folder.mkdir()
    deltas = make_deltas(model)
    save_merged(
        model,
        ScaledVector(deltas, dict.fromkeys(deltas, 0.5)),
        CheckpointFolder(folder, tokenizer, "20KB"),
        ALONE,
    )
    save_adapter(
        model,
        ScaledVector(deltas, dict.fromkeys(deltas, 0.5)),
        "base",
        tokenizer,
        folder / "adapter",
        ALONE,
    )
    for name in ("html", "coefficients.png", "history.png"):
        (folder / f"safegene_report.{name}").write_text("x")
    (folder / "README.md").write_text("x")
    (folder / MARKER).write_text("{}")
    return folder


def test_a_checkpoint_and_a_vector_are_ours(checkpoint, vector_dir, tmp_path):
    assert foreign_file(checkpoint, CHECKPOINT) is None
    assert foreign_file(vector_dir, VECTOR) is None
    assert foreign_file(vector_dir, CHECKPOINT) and foreign_file(checkpoint, VECTOR)
    check_replaceable(checkpoint, CHECKPOINT)
    check_replaceable(tmp_path / "none", CHECKPOINT)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    check_replaceable(tmp_path / "empty", CHECKPOINT)


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        "evaluation/harmful.jsonl",
        "history.jsonl",
        "optimizer.pt",
        "adapter/checkpoint/model.safetensors",
        ".hidden",
        "vector/adapter_model.safetensors",
        "vector/safegene_config.json",
        "model.safetensors.bak",
        "checkpoint-10/model.safetensors",
        "adapter/safegene_report.json",
        "README.md\n",
        "pytorch_model.bin",
    ],
)
def test_foreign_files(name, checkpoint):
    path = checkpoint / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match="files that SafeGene did not write") as caught:
        check_replaceable(checkpoint, CHECKPOINT)
    assert name in str(caught.value) and path.read_text() == "mine"


def test_links_are_foreign(checkpoint, tmp_path):
    (checkpoint / "vocab.json").symlink_to(tmp_path)
    assert foreign_file(checkpoint, CHECKPOINT) == "vocab.json"
    (checkpoint / "vocab.json").unlink()
    (tmp_path / "link").symlink_to(checkpoint)
    with pytest.raises(OutputError, match="symbolic link"):
        check_replaceable(tmp_path / "link", CHECKPOINT)


def test_the_record_of_written_files_goes_before_the_known_names(checkpoint):
    names = [
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    ]
    (checkpoint / MARKER).write_text(
        json.dumps({"files": dict.fromkeys([*names, "odd.vocabulary"], "0" * 64)})
    )
    (checkpoint / "odd.vocabulary").write_text("x")
    assert foreign_file(checkpoint, CHECKPOINT) is None
    (checkpoint / "merges.txt").write_text("x")  # a name that checkpoints have, but not this one
    assert foreign_file(checkpoint, CHECKPOINT) == "merges.txt"


@pytest.mark.parametrize(
    "report", ["", "[]", '{"files": 3}', '{"files": ["thesis.txt"]}', "[" * 100_000, "\x00"]
)
def test_a_report_that_says_nothing(report, checkpoint):
    (checkpoint / MARKER).write_text(report)
    assert foreign_file(checkpoint, CHECKPOINT) is None
    (checkpoint / "thesis.txt").write_text("mine")
    assert foreign_file(checkpoint, CHECKPOINT) == "thesis.txt"


def test_without_its_marker_a_folder_is_not_ours(checkpoint, vector_dir, tmp_path):
    (checkpoint / MARKER).unlink()
    with pytest.raises(OutputError, match="did not write"):
        check_replaceable(checkpoint, CHECKPOINT)
    vector = shutil.copytree(vector_dir, tmp_path / "vector")
    (vector / "model.sig").write_text("x")
    check_replaceable(vector, VECTOR)
    (vector / VECTOR.marker).unlink()
    with pytest.raises(OutputError, match="did not write"):
        check_replaceable(vector, VECTOR)


def test_a_touch_up_is_ours_where_the_record_of_files_is_damaged(tmp_path):
    (tmp_path / "safegene_report.json").write_text("{")
    (tmp_path / TOUCH_UP).parent.mkdir()
    (tmp_path / TOUCH_UP).touch()
    assert foreign_file(tmp_path, CHECKPOINT) is None
    (tmp_path / TOUCH_UP).with_name("mine.safetensors").touch()
    assert foreign_file(tmp_path, CHECKPOINT) == "touch_up/mine.safetensors"
