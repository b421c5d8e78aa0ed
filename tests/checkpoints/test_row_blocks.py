"""Blocks of stored tensors are read whole, or not at all, by several threads."""

import threading

import pytest
import torch

from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.merge_terms import NO_VECTOR
from safegene_trl.checkpoints.row_blocks import in_threads
from safegene_trl.checkpoints.stored_merge import write_merged
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import CheckpointError

from ..conftest import make_model
from .test_stored_merge import saved


def test_file_that_shrinks_while_it_is_read(tokenizer, tmp_path):
    source = saved(make_model(), tokenizer, tmp_path / "model")
    stored = StoredModel.open(str(source))
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="became shorter"):
        write_merged(stored, NO_VECTOR, CheckpointFolder(tmp_path / "out", tokenizer, "5GB"))


def test_work_is_shared_by_threads_and_an_error_ends_it():
    before = torch.get_num_threads()
    seen = set()

    def work(job):
        seen.add(threading.current_thread().name)
        return 1 // job

    assert list(in_threads(work, [1] * 50)) == [1] * 50
    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, [1, 0, 1]))
    assert torch.get_num_threads() == before and threading.current_thread().name not in seen
