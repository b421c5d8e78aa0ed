"""The hash of a file is the one of its bytes, in whatever order and pieces they were written."""

import hashlib
import itertools
import os
import random
import threading

import pytest

from safegene_trl.checkpoints import following_hash
from safegene_trl.checkpoints.following_hash import FollowingHash


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(following_hash, "_PIECE", 64)


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "x+b", buffering=0) as opened:
        yield opened


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order(file, seed):
    drawn = random.Random(seed)
    data = drawn.randbytes(5_000)
    edges = sorted({0, 5_000, *drawn.sample(range(5_000), 60)})
    pieces = list(itertools.pairwise(edges))
    drawn.shuffle(pieces)
    file.truncate(len(data))
    found = FollowingHash(file.fileno(), len(data))
    for first, end in pieces:
        file.seek(first)
        file.write(data[first:end])
        found.written(first, end)
    assert found.finish() == hashlib.sha256(data).hexdigest()


def test_nothing_is_read_before_it_is_written(file, monkeypatch):
    data, read, twice = bytes(range(200)), [], threading.Event()
    original = os.preadv

    def reads(descriptor, buffers, position):
        read.append(position + len(buffers[0]))
        if len(read) == 2:
            twice.set()
        return original(descriptor, buffers, position)

    monkeypatch.setattr(following_hash.os, "preadv", reads)
    file.truncate(len(data))
    found = FollowingHash(file.fileno(), len(data))
    file.write(data[:100])
    found.written(0, 100)
    assert twice.wait(60) and read[:2] == [64, 100]
    file.write(data[100:])
    found.written(100, 200)
    assert found.finish() == hashlib.sha256(data).hexdigest()


def test_what_nobody_has_written_are_zeros(file):
    file.truncate(300)
    file.write(b"head")
    found = FollowingHash(file.fileno(), 300)
    found.written(0, 4)
    assert found.finish() == hashlib.sha256(b"head" + bytes(296)).hexdigest()


def test_an_empty_file(file):
    assert FollowingHash(file.fileno(), 0).finish() == hashlib.sha256().hexdigest()


def test_a_file_that_became_shorter_is_no_hash(file):
    file.write(bytes(10))
    found = FollowingHash(file.fileno(), 200)
    found.written(0, 200)
    with pytest.raises(OSError, match="became shorter"):
        found.finish()


def test_one_that_is_stopped_waits_for_nobody(file):
    file.truncate(200)
    found = FollowingHash(file.fileno(), 200)
    found.stop()
    assert not found._thread.is_alive()
    with pytest.raises(OSError, match="given up"):  # and no hash of a part
        found.finish()
