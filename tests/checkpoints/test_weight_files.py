"""Weight files go to the disk, and are hashed, while others are written."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from safegene_trl.checkpoints import staging, weight_files
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.tensor_file import TensorFile
from safegene_trl.checkpoints.weight_files import AT_ONCE, WeightFiles
from safegene_trl.provenance import sha256_of_file


COUNT = AT_ONCE + 2


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(10, 10, generator=generator) for i in range(COUNT)}


@pytest.fixture
def files(tensors, tmp_path):
    """One file for each tensor."""
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return WeightFiles(CheckpointFolder(tmp_path, None, "0.4KB"), contents)


def test_files_and_their_hashes(files, tensors, tmp_path):
    with files:
        for name, tensor in tensors.items():
            files.write(name, tensor)
        files.complete()
    found, written = files._folder.digests, sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == COUNT
    assert found == {path.name: sha256_of_file(path) for path in written}
    for path in written:
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, tensors[name])


def test_few_files_wait_for_the_disk(files, tensors, monkeypatch):
    closed, go = [], threading.Event()
    original = TensorFile.close

    def slow(file):
        assert go.wait(60)
        closed.append(file)
        return original(file)

    monkeypatch.setattr(weight_files.TensorFile, "close", slow)
    with files:
        for name in list(tensors)[:AT_ONCE]:
            files.write(name, tensors[name])  # does not wait
        assert not closed
        go.set()
        files.write(str(AT_ONCE), tensors[str(AT_ONCE)])
        assert len(files._folder.digests) == 1
        files.complete()
    assert len(files._folder.digests) == AT_ONCE + 1


def test_a_disk_that_is_full_is_told_and_nothing_is_left_open(files, tensors, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), files:
        files.write("0", tensors["0"])
        files.write("1", tensors["1"])
        files.complete()
    assert all(file._file.closed for file in files._open.values())
    assert not any(file._hash._thread.is_alive() for file in files._open.values())


def test_a_failure_of_the_work_waits_for_no_hash(files, tensors):
    with pytest.raises(ZeroDivisionError), files:
        file = files.open(next(iter(files.plan)))
        raise ZeroDivisionError
    assert file._file.closed and not file._hash._thread.is_alive()


def test_tensors_are_written_in_pieces_and_few_bytes_are_on_their_way(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "PIECE_BYTES", 64)
    monkeypatch.setattr(weight_files, "IN_FLIGHT_BYTES", 256)
    go, begun, original = threading.Event(), [], TensorFile.write

    def slow(file, name, data, offset=0):
        begun.append(data.numel())
        assert go.wait(60)
        original(file, name, data, offset)

    monkeypatch.setattr(TensorFile, "write", slow)
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(10, 5, generator=generator).half() for i in range(6)}
    tensors |= {"scalar": torch.tensor(2.0), "none": torch.empty(0, 3)}
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with WeightFiles(CheckpointFolder(tmp_path, None, "1GB"), contents) as files:
        files.write("0", tensors["0"])  # does not wait: 200 bytes are on their way
        threading.Timer(0.2, go.set).start()
        for name in list(tensors)[1:]:
            files.write(name, tensors[name])
            assert sum(size for _, size in files._in_flight) <= 256
        files.complete()
    assert max(begun) == 64
    (written,) = tmp_path.glob("*.safetensors")
    found = load_file(written)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_write_that_fails_is_told_and_nothing_is_left_open(files, tensors, monkeypatch):
    def full(file, name, data, offset=0):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "write", full)
    with pytest.raises(OSError, match="No space left"), files:
        for name, tensor in tensors.items():
            files.write(name, tensor)
        files.complete()
    assert all(file._file.closed for file in files._open.values())
    assert not any(file._hash._thread.is_alive() for file in files._open.values())
