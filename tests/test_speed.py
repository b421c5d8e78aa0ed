"""The edit loop has something of every part of the package, and what `speed.py` names is there."""

from pathlib import Path

import pytest

from .speed import FAST, LONGEST


ROOT = Path(__file__).resolve().parents[1]


def test_what_is_named_is_there():
    for name in (*FAST, *LONGEST):
        file, _, test = name.partition("::")
        assert (ROOT / file).exists() and f"def {test}" in (
            Path(ROOT / file).read_text() if test else "def "
        ), name


def test_every_part_of_the_package_has_a_fast_test():
    parts = {path.parent.name for path in (ROOT / "safegene_trl").glob("*/*.py")}
    assert len(parts) > 10 and not parts - {name.split("/")[1] for name in FAST}


def test_the_marker_is_on_them(request):
    assert request.node.get_closest_marker("fast")


@pytest.mark.exhaustive
def test_the_other_marker_is_left_out_of_the_quick_suite(request):
    assert "not exhaustive" not in request.config.option.markexpr
