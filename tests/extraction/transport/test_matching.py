"""Which layer of the source a layer of the target takes its direction from."""

import numpy as np
import pytest

from safegene_trl.extraction.transport.matching import by_cka, by_depth, cka

from .arrays import rows


@pytest.fixture
def layers(tmp_path):
    """States of four layers of a source, and of three of a target that sees what 3, 0 and 2 see."""
    draw = np.random.default_rng(0)
    seen = [draw.standard_normal((200, 8)) for _ in range(4)]
    source = [
        rows(tmp_path, f"s{i}", s @ draw.standard_normal((8, 30))) for i, s in enumerate(seen)
    ]
    rotations = [np.linalg.qr(draw.standard_normal((50, 30)))[0].T for _ in range(3)]
    target = [
        rows(tmp_path, f"t{i}", source[origin].read() @ rotation * 5 + 1)
        for i, (origin, rotation) in enumerate(zip((3, 0, 2), rotations, strict=True))
    ]
    return source, target


def test_by_relative_depth():
    assert by_depth([None] * 30, [None] * 24, None)[::23] == [0, 29]
    assert by_depth([None] * 3, [None] * 5, None) == [0, 0, 1, 2, 2]
    assert by_depth([None] * 5, [None], None) == [0]


def test_by_likeness(layers):
    every = np.arange(200)
    assert by_cka(*layers, every) == [3, 0, 2]
    table = cka(*layers, every)
    assert table[3, 0] == pytest.approx(1, abs=1e-3)
    assert np.abs(table[0, [0, 2]]).max() < 0.1


def test_likeness_does_not_grow_with_the_width(tmp_path):
    """As the plain estimate's does, to nearly 1 where there are fewer texts than numbers."""
    draw = np.random.default_rng(0)
    wide = [rows(tmp_path, str(i), draw.standard_normal((60, 2000))) for i in range(2)]
    assert abs(cka(wide[:1], wide[1:], np.arange(60))[0, 0]) < 0.1
