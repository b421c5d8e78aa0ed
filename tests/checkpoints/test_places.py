"""Every relation of an output folder to what is read is right or refused."""

import os
from pathlib import Path

import pytest

from safegene_trl.checkpoints import places
from safegene_trl.checkpoints.places import check_places
from safegene_trl.errors import OutputError

from .mounts import with_mounts


@pytest.fixture
def world(tmp_path):
    """`model/`, `vector/`, `out/safeguarded/` with an evaluation in it, `data/task.jsonl` and links
    to them.
    """
    for folder in ("model", "vector", "out/safeguarded/evaluation", "data", "v1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "task.jsonl").write_text("{}\n")
    (tmp_path / "model-link").symlink_to(tmp_path / "model")
    (tmp_path / "out-link").symlink_to("out")
    return tmp_path


REFUSED = {
    "equal": ("model", "model", "is the input .*model itself"),
    "equal through a link": ("model-link", "model", "itself"),
    "the input is the link": ("model", "model-link", "itself"),
    "equal by another spelling": ("out/../model/.", "model", "itself"),
    "the input inside": ("out/safeguarded", "out/safeguarded/evaluation", "holds the input"),
    "inside through a link": ("out-link/safeguarded", "out/safeguarded/evaluation", "holds the input"),
    "a file inside": ("data", "data/task.jsonl", "holds the input"),
    "a file that is to be made inside": ("new/safeguarded", Path("new/safeguarded/line/history.jsonl"), "holds the input"),
    "equal to a file that is to be made": ("new", Path("new"), "itself"),
    "inside the input": ("vector/safeguarded", "vector", "lies inside the input"),
    "deep inside a link to it": ("model-link/a/b", "model", "lies inside the input"),
    "a report of failure": ("new", Path("new.failed.json"), "reports of failures"),
    "an unfinished folder": ("v2", Path("_safegene.12345678.old.v2/vector"), "unfinished folders of"),
    "an unfinished folder of before": ("v1", Path(".v1.12345678.old"), "unfinished folders of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, world, monkeypatch):
    target, given, message = REFUSED[case]
    monkeypatch.chdir(world)
    for one, other in (
        (Path(target), given),
        (world / target, world / given),
        (Path(target), world / given),
    ):
        with pytest.raises(OutputError, match=message) as caught:
            check_places(one, {"the input": other})
        assert str(one) in str(caught.value) and "\n" not in str(caught.value)
    for several in ([given], [None, "no/such", given]):
        with pytest.raises(OutputError, match=message):
            check_places(Path(target), {"the input": several})


@pytest.mark.parametrize(
    ("target", "given"),
    [
        ("v1.2", "v1"),  # a prefix of the other's name
        ("v1", Path("v1.2")),
        ("out/safeguarded", "vector"),
        ("model-safeguarded", "model"),
        ("me/model", "me/model"),  # a hub id
        ("json", "json"),
        ("new", Path("new.jsonl")),
        ("new", Path("_safegene.12345678.old.newer")),
        ("new", ""),
        ("new", None),
        ("Model", "model"),  # another folder where names are told apart by case
    ],
)
def test_right(target, given, world, monkeypatch):
    monkeypatch.chdir(world)
    check_places(Path(target), {"the input": given})


def test_inside_what_may_hold_it(world, monkeypatch):
    monkeypatch.chdir(world)
    for given in (Path("out"), world / "out", Path("out-link")):
        check_places(
            Path("out/safeguarded"),
            {"the trainer's output": given},
            inside_ok=["the trainer's output"],
        )
    with pytest.raises(OutputError, match="itself"):
        check_places(
            Path("out"),
            {"the trainer's output": Path("out-link")},
            inside_ok=["the trainer's output"],
        )
    with pytest.raises(OutputError, match="holds"):
        check_places(
            Path("out"), {"the trainer's output": Path("out/a")}, inside_ok=["the trainer's output"]
        )


def test_names_that_differ_in_case_only(world, monkeypatch):
    """Where the file system takes them for one, what is not there yet is compared without case."""
    monkeypatch.setattr(places, "_ignores_case", lambda folder: True)
    with pytest.raises(OutputError, match="holds"):
        check_places(world / "New", {"the history": world / "new" / "history.jsonl"})
    monkeypatch.undo()
    assert not places._ignores_case(world) or os.path.exists(str(world).swapcase())
    check_places(world / "New", {"the history": world / "new" / "history.jsonl"})


def test_a_mount_of_the_same_folder_is_the_same(world):
    mounted = world / "mounted"
    mounted.mkdir()

    def look():
        for one, other, message in (
            (mounted / "safeguarded", world / "out" / "safeguarded", "itself"),
            (mounted, world / "out" / "safeguarded", "holds"),
            (world / "out" / "safeguarded" / "new", mounted / "safeguarded", "lies inside"),
        ):
            with pytest.raises(OutputError, match=message):
                check_places(one, {"the input": other})

    with_mounts(f"mount --bind {world / 'out'} {mounted}", look)
