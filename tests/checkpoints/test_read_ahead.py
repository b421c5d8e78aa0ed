"""Tensors that are read before they are asked for: all of them, in order, and not too many."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from safegene_trl.checkpoints import read_ahead
from safegene_trl.checkpoints.read_ahead import ReadAhead
from safegene_trl.checkpoints.tensor_file import stored_tensors
from safegene_trl.errors import CheckpointError


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(3 + i, 5) for i in range(9)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors, stored_tensors(tmp_path)


def test_tensors_come_in_the_order_that_is_told(stored, monkeypatch):
    tensors, files = stored
    monkeypatch.setattr(read_ahead, "_PIECE", 16)  # every tensor in several pieces
    names = sorted(tensors, reverse=True)
    with ReadAhead(files, names) as reader:
        for name in names:
            read, tensor = reader.next()
            assert read == name and torch.equal(tensor, tensors[name])


def test_no_more_is_read_ahead_than_is_allowed(stored, monkeypatch):
    _, files = stored
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 200)
    begun, original = [], ReadAhead._read

    def counted(reader, file, tensor):
        begun.append(tensor.nbytes)
        return original(reader, file, tensor)

    monkeypatch.setattr(ReadAhead, "_read", counted)
    names = [f"t{i}" for i in range(9)]
    with ReadAhead(files, names) as reader:
        taken = 0
        for _ in names:
            taken += reader.next()[1].nbytes
            # the one that crosses the limit is the last
            assert sum(begun) - taken - begun[-1] < 200
    assert len(begun) == 9


def test_a_file_that_ends_early_is_said_and_no_thread_stays(stored):
    _, files = stored
    path = next(iter(files.values())).path
    threads = threading.active_count()
    with open(path, "r+b") as file:
        file.truncate(max(each.begin for each in files.values()) + 1)
    with (
        pytest.raises(CheckpointError, match="became shorter while it was read"),
        ReadAhead(files, files) as reader,
    ):
        for _ in files:
            reader.next()
    assert threading.active_count() == threads
