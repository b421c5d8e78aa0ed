"""What cannot be written is refused at the start, and the trial leaves nothing."""

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from safegene_trl.checkpoints import preflight as trial
from safegene_trl.checkpoints.contents import MARKER
from safegene_trl.checkpoints.preflight import check_output, check_writable
from safegene_trl.errors import OutputError

from .mounts import with_mounts


def everything(folder):
    return sorted((str(path), path.lstat().st_mode) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, request):
    """Whatever the outcome, only what a test made itself is there."""
    yield
    assert not [path for path in tmp_path.rglob("*") if "safegene." in path.name]


def finished(target):
    target.mkdir(parents=True)
    (target / MARKER).write_text("{}")
    return target


def test_what_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier = finished(tmp_path / "earlier")
    before = everything(tmp_path)
    for target in (
        Path("out"),
        tmp_path / "a" / "b" / "c",
        earlier,
        tmp_path / ("x" * 231),
        Path("earlier/../new"),
    ):
        check_output(target, 1000)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "cannot be made"),
        (".", "cannot be made"),
        ("..", "cannot be made"),
        ("a/..", "cannot be made"),
        ("/", "cannot be made"),
        ("a\0b", "cannot be made"),
        ("x" * 232, "too long for its reports.*at most 231"),
        ("é" * 120, "too long"),
        ("/".join(["x" * 200] * 21), "File name too long"),
        ("file/out", "Not a directory"),
        ("file", "is a file"),
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("_safegene.12345678.new.out", "unfinished"),
        (".out.12345678.tmp", "unfinished"),
        ("here", "current folder"),
        ("/proc/out", "/proc is not writable"),
        ("\udcff\ud800", "no valid name"),
    ],
)
def test_what_cannot(name, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    finished(tmp_path / "safeguarded")
    (tmp_path / "link").symlink_to("safeguarded")
    (tmp_path / "dangling").symlink_to("nowhere")
    (finished(tmp_path / "here") / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "adapter" if name == "here" else tmp_path)
    before = everything(tmp_path)
    for target in (Path(name),) if name in ("", ".", "/") else (Path(name), tmp_path / name):
        if name == "here":
            target = tmp_path / name
        with pytest.raises(OutputError, match=message) as caught:
            check_output(target)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert everything(tmp_path) == before


def test_too_little_space(tmp_path):
    with pytest.raises(OutputError, match="GiB free"):
        check_output(tmp_path / "a" / "out", needed_bytes=2**60)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("function", "code"),
    [("mkdir", errno.EACCES), ("rename", errno.EXDEV), ("rename", errno.EPERM), ("fsync", errno.EDQUOT), ("mkdir", errno.EROFS)],
)  # fmt: skip
def test_every_operation_is_tried(function, code, tmp_path, monkeypatch):
    plain = getattr(os, function)

    def fails(*arguments, **keywords):
        # the second rename puts the trial's folder back; folders are flushed as well
        if function == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            return plain(*arguments, **keywords)
        assert function != "rename" or Path(arguments[0]) != Path(arguments[1])
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code))
        return plain(*arguments, **keywords)

    calls = []
    monkeypatch.setattr(os, function, fails)
    with pytest.raises(OutputError, match=os.strerror(code)):
        check_output(tmp_path / "out")
    monkeypatch.undo()
    assert everything(tmp_path) == []


def test_an_earlier_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    target = finished(tmp_path / "out")
    plain = os.rename

    def rename(one, other):
        if Path(one) == target:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        plain(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match=r"cannot be replaced .*mount point"):
        check_output(target)
    monkeypatch.undo()
    check_output(target)
    assert (target / MARKER).read_text() == "{}"


def test_mount_points_and_disks_that_are_full_or_read_only(tmp_path):
    for name in ("bind", "source", "volume", "readonly", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / MARKER).write_text("{}")
    (tmp_path / "readonly" / "history.jsonl").write_text("")
    shell = (
        f"mount --bind {tmp_path}/source {tmp_path}/bind && mount -t tmpfs -o size=64k none {tmp_path}/volume && "
        f"mount --bind {tmp_path}/readonly {tmp_path}/readonly && mount -o remount,ro,bind {tmp_path}/readonly && "
        f"mount -t tmpfs -o size=32k none {tmp_path}/full && head -c 32768 /dev/zero > {tmp_path}/full/history.jsonl"
    )

    def look():
        for name, message in (
            ("bind", "mount point"),  # of the same file system
            ("volume", "mount point"),
            ("readonly/out", "Read-only file system"),
            ("readonly/history.jsonl", "Read-only file system"),
            ("full/out", "No space left"),
            ("full/new.jsonl", "No space left"),
        ):
            with pytest.raises(OutputError, match=message):
                (check_writable if name.endswith("jsonl") else check_output)(tmp_path / name)
        check_output(tmp_path / "free")

    with_mounts(shell, look)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_missing_permissions(tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    closed, sticky = tmp_path / "closed", tmp_path / "sticky"
    closed.mkdir()
    (closed / "history.jsonl").write_text("")
    theirs = finished(sticky / "theirs")
    theirs.chmod(0o777)
    (theirs / MARKER).chmod(0o666)
    sticky.chmod(0o1777)
    half = tmp_path / "half"
    (half / "out" / "adapter").mkdir(parents=True)
    (half / "out" / MARKER).write_text("{}")
    (half / "out").chmod(0o777)
    half.chmod(0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(65534)
            for path, message in (
                (closed / "out", "is not writable (Permission denied)"),
                (sticky / "theirs", "cannot be replaced (Operation not permitted)"),
                (half / "out", "adapter is not writable"),
                (closed / "history.jsonl", "Permission denied"),
                (closed / "new.jsonl", "Permission denied"),
            ):
                try:
                    (check_writable if path.suffix else check_output)(path)
                    raise AssertionError(path)
                except OutputError as error:
                    assert message in str(error), error
            check_output(sticky / "ours")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not (sticky / "ours").exists()


def test_several_at_once(tmp_path):
    errors = []
    finished(tmp_path / "earlier")

    def check():
        try:
            for _ in range(30):
                for target in (tmp_path / "a" / "b" / "out", tmp_path / "earlier"):
                    check_output(target)
                check_writable(tmp_path / "line" / "history.jsonl")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=check) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert errors == [] and (tmp_path / "earlier" / MARKER).is_file()
    assert (
        not (tmp_path / "a" / "b" / "out").exists()
        and not (tmp_path / "line" / "history.jsonl").exists()
    )


def test_a_history(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    check_writable(path)
    check_writable(tmp_path / "a" / "b" / "history.jsonl")
    assert everything(tmp_path) == []
    path.write_text("line\n")
    (tmp_path / "link.jsonl").symlink_to("history.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to("folder/new.jsonl")
    before = everything(tmp_path)
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        check_writable(path)  # another run is just adding a line
    check_writable(tmp_path / "link.jsonl")
    check_writable(tmp_path / "dangling.jsonl")
    assert everything(tmp_path) == before and path.read_text() == "line\n"
    monkeypatch.setattr(
        trial.fcntl,
        "flock",
        lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")),
    )
    with pytest.raises(OutputError, match="No locks available"):
        check_writable(path)


def test_what_can_be_no_history(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    cases = {
        "": "cannot be made",
        ".": "cannot be made",
        "a\0": "cannot be made",
        "x" * 256: "too long",
    }
    cases |= {
        str(tmp_path): "Is a directory",
        str(tmp_path / "pipe"): "no plain file",
        "/dev/null": "no plain file",
    }
    cases |= {
        str(tmp_path / "file" / "history"): "Not a directory",
        "/proc/history": "cannot be written",
    }
    for name, message in cases.items():
        with pytest.raises(OutputError, match=message):
            check_writable(Path(name))
