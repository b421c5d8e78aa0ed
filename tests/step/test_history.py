"""The releases of a model line: chained, append-only, watched for drift."""

import errno
import json
import multiprocessing
import time

import pytest

from safegene_trl.errors import OutputError, SafeGeneError
from safegene_trl.judges.intervals import Rate
from safegene_trl.provenance import sha256_of_json
from safegene_trl.reporting.cells import headings, measured_cells
from safegene_trl.step import history, history_file
from safegene_trl.step.history import (
    append_release,
    base_warnings,
    history_warnings,
    last_accepted,
    prepared_release,
    read_history,
    seal_history,
)
from safegene_trl.step.history_file import seal_path


HASH = "0" * 64


def release(refused=90, count=100, outcome="accepted", base="a", carries=False, **values):
    return {
        "time": "2030-01-01T00:00:00+00:00",
        "output": "out",
        "outcome": outcome,
        "reason": "Held-out safety improved.",
        "vector": {"name": "v", "sha256": HASH},
        "coefficients": {"layers.1": 0.5},
        "held_out": None,
        "before": None,
        "after": {"refusal_rate": Rate(refused, count).to_dict()},
        "utility_loss": None,
        "base": {
            "name": "model",
            "revision": base,
            "sha256": sha256_of_json(base),
            "carries_vector": carries,
        },
        "report": HASH,
        **values,
    }


def unsealed(path, count=3):
    """A history as it was before there were seals."""
    previous, lines = None, []
    for number in range(count):
        lines.append(json.dumps(release(number=number) | {"previous": previous}))
        previous = history.hashlib.sha256(lines[-1].encode()).hexdigest()
    path.write_text("".join(line + "\n" for line in lines))


def test_releases_are_kept_in_order_and_chained(tmp_path):
    path = tmp_path / "line" / "history.jsonl"
    assert read_history(path) == []
    for number in range(3):
        append_release(path, release(number=number))
    found = read_history(path)
    assert [entry["number"] for entry in found] == [0, 1, 2]
    assert found[0]["previous"] is None and len({entry["previous"] for entry in found}) == 3
    assert last_accepted([*found, release(outcome="rejected")])["number"] == 2
    assert last_accepted([]) is None


def test_numbers_against_the_aligned_model_are_kept_where_there_are_any(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release())  # as of older versions
    restored = {"share": 0.75, "low": 0.5, "high": 0.9, "count": 20}
    append_release(path, release(restored=restored))
    older, newer = read_history(path)
    assert newer["restored"] == restored and "restored" not in older
    assert measured_cells(newer)[headings().index("restored")] == "75%"
    assert measured_cells(older)[headings().index("restored")] == ""
    with pytest.raises(SafeGeneError, match=r"`restored` in .* is not as it must be"):
        append_release(path, release(restored="much"))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("change", ["changed", "taken out", "no JSON"])
def test_a_changed_line_is_noticed(tmp_path, change, place):
    path = tmp_path / "history.jsonl"
    for number in range(3):
        append_release(path, release(number=number))
    lines = path.read_text().splitlines(keepends=True)
    changed = lines[place].replace(f'"number": {place}', '"number": 7')
    assert changed != lines[place]
    lines[place] = {"changed": changed, "taken out": "", "no JSON": "{\n"}[change]
    path.write_text("".join(lines))
    with pytest.raises(SafeGeneError, match="restore the file"):
        read_history(path)
    # what an append, which does not read the whole file, has to notice
    if place == 2 or change == "taken out":
        with pytest.raises(SafeGeneError, match="as it was sealed"):
            append_release(path, release())
        assert path.read_text() == "".join(lines)


def test_a_history_that_is_gone_or_begun_anew_beside_its_seal_is_noticed(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release())
    path.unlink()
    with pytest.raises(SafeGeneError, match=r"move it away together with history\.jsonl\.seal"):
        read_history(path)
    seal_path(path).unlink()
    append_release(path, release())
    assert len(read_history(path)) == 1


def test_a_seal_that_is_gone_or_damaged_is_noticed_and_made_anew_on_demand(tmp_path):
    path = tmp_path / "history.jsonl"
    for number in range(2):
        append_release(path, release(number=number))
    first = path.read_text().splitlines(keepends=True)[0]
    path.write_text(first)
    for damage in (
        None,
        "{}x",
        "[]",
        '{"releases": 1}',
        '{"releases": -1, "size": 1, "last": null}',
    ):
        if damage is None:
            seal_path(path).unlink()
        else:
            seal_path(path).write_text(damage)
        with pytest.raises(SafeGeneError, match=r"seal it anew|as it was sealed"):
            read_history(path)
    assert seal_history(path) == len(read_history(path)) == 1
    append_release(path, release())
    assert len(read_history(path)) == 2


def test_a_crash_between_line_and_seal_is_no_tampering(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append_release(path, release(number=0))
    earlier = seal_path(path).read_bytes()
    append_release(path, release(number=1))
    seal_path(path).write_bytes(earlier)
    assert [entry["number"] for entry in read_history(path)] == [0, 1]
    append_release(path, release(number=2))
    assert [entry["number"] for entry in read_history(path)] == [0, 1, 2]
    assert json.loads(seal_path(path).read_text())["releases"] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "history.jsonl",
        "history.jsonl.seal",
    ]


@pytest.mark.parametrize("writes", range(1, 4))
def test_a_crash_at_any_write_leaves_a_history_that_goes_on(tmp_path, monkeypatch, writes):
    path, done = tmp_path / "history.jsonl", []

    def crashing(sync):
        def fsync(descriptor):
            if len(done) == writes:
                raise KeyboardInterrupt
            done.append(descriptor)
            sync(descriptor)

        return fsync

    monkeypatch.setattr(history.os, "fsync", crashing(history.os.fsync))
    with pytest.raises(KeyboardInterrupt):
        for number in range(3):
            append_release(path, release(number=number))
    monkeypatch.undo()
    before = [entry["number"] for entry in read_history(path)]
    assert before == list(range(len(before)))
    append_release(path, release(number=len(before)))
    assert [entry["number"] for entry in read_history(path)] == [*before, len(before)]


def test_an_old_history_is_read_with_a_warning_and_sealed_by_the_next_release(tmp_path):
    path = tmp_path / "history.jsonl"
    assert history_warnings(path) == []
    unsealed(path)
    assert len(read_history(path)) == 3 and "has no seal yet" in history_warnings(path)[0]
    append_release(path, release(number=3))
    assert len(read_history(path)) == 4 and history_warnings(path) == []
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(SafeGeneError, match="as it was sealed"):
        read_history(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("outcome", "fine"),
        ("outcome", ["accepted"]),
        ("time", 3),
        ("base", None),
        ("base", {"name": "m", "revision": None, "sha256": None, "carries_vector": "no"}),
        ("vector", "v"),
        ("vector", {"name": "v", "sha256": 1}),
        ("coefficients", {"layers.1": "0.5"}),
        ("coefficients", {"layers.1": float("nan")}),
        ("coefficients", {"layers.1": -0.5}),
        ("coefficients", [0.5]),
        ("held_out", {"before": {"safety": 1.0}}),
        ("after", {"refusal_rate": 0.9}),
        ("after", {"refusal_rate": Rate(9, 10).to_dict() | {"successes": "9"}}),
        ("after", {"refusal_rate": Rate(9, 10).to_dict() | {"count": 0}}),
        ("after", {"categories": {"a": None}}),
        ("coefficients", {"layers.1": 10**400}),
        ("after", {"refusal_rate": Rate(9, 10).to_dict() | {"count": 10**400}}),
        ("after", {"refusal_rate": Rate(9, 10).to_dict() | {"count": 10**300}}),
        ("after", {"refusal_rate": Rate(9, 10).to_dict() | {"share": 10**400}}),
        ("utility_loss", {"share": True, "low": 0.0, "high": 0.0, "count": 1}),
        ("report", None),
        ("previous", 5),
    ],
)
def test_a_line_of_the_wrong_shape_is_refused_with_its_number(tmp_path, name, value):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(release() | {"previous": None}) + "\n")
    (good,) = read_history(path)
    second = good | {
        "previous": history.hashlib.sha256(path.read_bytes()[:-1]).hexdigest(),
        name: value,
    }
    path.write_text(path.read_text() + json.dumps(second) + "\n")
    with pytest.raises(SafeGeneError, match=r"[Ll]ine 2 of the history .*restore the file"):
        read_history(path)
    if name != "previous":
        with pytest.raises(SafeGeneError, match="new release"):
            append_release(tmp_path / "new.jsonl", release() | {name: value})
        assert read_history(tmp_path / "new.jsonl") == []


def test_infinity_is_no_number(tmp_path):
    path = tmp_path / "history.jsonl"
    line = json.dumps(release(coefficients={"layers.1": 9.5}) | {"previous": None}).replace(
        "9.5", "1e999"
    )
    path.write_text(line + "\n")
    with pytest.raises(SafeGeneError, match=r"Line 1 .* is damaged"):
        read_history(path)


def _append_some(path, number):
    for _ in range(5):
        append_release(path, release(number=number))


def test_runs_that_end_at_the_same_time_all_get_their_line(tmp_path):
    path = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_some, args=(path, number)) for number in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        read_history(path)  # a reader sees no half of anything
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(entry["number"] for entry in read_history(path)) == sorted([0, 1, 2, 3] * 5)


def test_ten_thousand_releases_are_no_burden(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    unsealed(path, 10_000)
    seal_history(path)
    started = time.process_time()
    append_release(path, release(number=10_000))
    assert time.process_time() - started < 0.1  # it reads the end only
    assert len(read_history(path)) == 10_001
    assert time.process_time() - started < 2.0  # a second on a machine of its own
    parsed = []
    monkeypatch.setattr(history, "parse_release", lambda line, where: parsed.append(line))
    append_release(path, release())
    assert len(parsed) == 1


def test_the_last_line_is_found_however_long_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(history_file, "_BLOCK", 16)
    path = tmp_path / "history.jsonl"
    for number in range(3):
        append_release(path, release(number=number))
    assert len(read_history(path)) == 3


def test_a_line_that_a_crash_cut_off_is_forgotten(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release(number=0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(read_history(path)) == 1
    append_release(path, release(number=1))
    assert [entry["number"] for entry in read_history(path)] == [0, 1]
    path.write_bytes(whole[:40])
    seal_path(path).unlink()
    append_release(path, release(number=5))
    assert [entry["number"] for entry in read_history(path)] == [5]


def test_another_base_is_noticed():
    def found(name, carries=False):
        return {
            "name": "model",
            "revision": name,
            "files": {"model.safetensors": name},
            "carries_vector": carries,
        }

    def line(name, **values):
        entry = release(base=name, **values)
        entry["base"]["sha256"] = sha256_of_json({"model.safetensors": name})
        return entry

    assert base_warnings([], found("a")) == base_warnings([line("a")], found("a")) == []
    assert "model at b instead of model at a" in base_warnings([line("a")], found("b"))[0]
    assert base_warnings([line("a")], found("b", carries=True)) == []
    assert base_warnings([line("a"), line("r1", carries=True)], found("a")) == []
    assert base_warnings([line("a"), line("b", outcome="rejected")], found("a")) == []


def test_history_is_one_json_object_per_line(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release(reason="línea\nnueva"))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reason"] == "línea\nnueva"


def test_a_release_that_is_prepared_needs_no_more_space_and_is_none_before_it_is_added(
    tmp_path, monkeypatch
):
    path = tmp_path / "history.jsonl"
    append_release(path, release(number=0))
    with prepared_release(path, release(number=1)) as add:
        size, blocks = path.stat().st_size, path.stat().st_blocks
        assert [entry["number"] for entry in read_history(path)] == [0]
        add()
        assert (path.stat().st_size, path.stat().st_blocks) == (size, blocks)
    assert [entry["number"] for entry in read_history(path)] == [0, 1]
    before = path.read_bytes()
    with pytest.raises(KeyError), prepared_release(path, release(number=2)):
        raise KeyError
    assert path.read_bytes() == before
    append_release(path, release(number=3))
    assert [entry["number"] for entry in read_history(path)] == [0, 1, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "history.jsonl",
        "history.jsonl.seal",
    ]


@pytest.mark.parametrize("writes", [0, 1])
def test_a_full_disk_names_the_history_and_leaves_it_as_it_was(writes, tmp_path, monkeypatch):
    path, done = tmp_path / "history.jsonl", []
    append_release(path, release(number=0))
    before = path.read_bytes(), seal_path(path).read_bytes()

    def full(descriptor):
        done.append(descriptor)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(history.os, "fsync", full)
    with pytest.raises(
        OutputError,
        match=r"The history .*history\.jsonl cannot be written \(No space left on device\)",
    ):
        append_release(path, release(number=1))
    assert (path.read_bytes(), seal_path(path).read_bytes()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "history.jsonl",
        "history.jsonl.seal",
    ]
