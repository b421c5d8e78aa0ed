"""Records are found by kind and name, and no writer loses another's, whenever it is killed."""

import importlib
import json
import multiprocessing
import sys

import pytest

from benchmarks import records
from safegene_trl.checkpoints import atomic_writes
from safegene_trl.errors import SafeGeneError


def test_a_record_is_appended_replaced_and_read(tmp_path):
    assert records.load("speed", tmp_path) == {}
    # a line break to Python, not to JSON
    records.write("speed", "b", {"seconds": 1.5, "note": "λ\u2028"}, tmp_path)
    records.write("speed", "a", {"seconds": None}, tmp_path)
    records.write("speed", "b", {"seconds": 0.1, "note": "λ\u2028"}, tmp_path)
    lines = (tmp_path / "speed.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines == [
        '{"name": "a", "seconds": null}',
        '{"name": "b", "seconds": 0.1, "note": "λ\u2028"}',
        "",
    ]
    assert records.read("speed", "b", tmp_path) == {"name": "b", "seconds": 0.1, "note": "λ\u2028"}
    records.write("judges", None, {"kappa": 0.95}, tmp_path)
    assert records.read("judges", folder=tmp_path) == {"kappa": 0.95}
    assert (tmp_path / "judges.json").read_text() == '{\n "kappa": 0.95\n}\n'
    assert records.listed(tmp_path) == {"judges": [], "speed": ["a", "b"]}


@pytest.mark.parametrize(
    ("kind", "name"), [("speed", "c"), ("speed", None), ("judges", "a"), ("nothing", None)]
)
def test_a_record_that_is_not_there_is_refused(kind, name, tmp_path):
    records.write("speed", "a", {}, tmp_path)
    records.write("judges", None, {}, tmp_path)
    with pytest.raises(
        SafeGeneError, match=rf"{kind}\.json.* holds no record .*python -m benchmarks\.records"
    ):
        records.read(kind, name, tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"name": "a"}', "two records named `a`"),
        ('{"name": "b", "seco', "Line 2 of .*speed.jsonl is no record"),
        ('{"seconds": 1}', "Line 2 of .*speed.jsonl is no record"),
        ("[1]", "Line 2 of .*speed.jsonl is no record"),
    ],
)
def test_a_damaged_file_is_refused_and_kept(line, said, tmp_path):
    path = tmp_path / "speed.jsonl"
    path.write_text(text := f'{{"name": "a"}}\n{line}\n')
    with pytest.raises(SafeGeneError, match=said):
        records.write("speed", "c", {}, tmp_path)
    assert path.read_text() == text


def test_a_writer_that_is_stopped_leaves_the_old_file(tmp_path, monkeypatch):
    records.write("speed", "a", {"seconds": 1}, tmp_path)
    before = (tmp_path / "speed.jsonl").read_bytes()

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_writes, "sync", stopped)
    with pytest.raises(KeyboardInterrupt):
        records.write("speed", "a", {"seconds": 2}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["speed.jsonl"]
    assert (tmp_path / "speed.jsonl").read_bytes() == before


def _write_ten(writer, folder):
    for i in range(10):
        records.write("speed", f"{writer}-{i}", {"writer": writer}, folder)


def test_writers_at_once_lose_no_record_of_each_other(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=_write_ten, args=(w, tmp_path))
        for w in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4 and len(
        records.load("speed", tmp_path)
    ) == 40


def test_the_command_lists_and_shows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["records"])
    records.main()
    assert "recalibration: layer, module\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["records", "recalibration", "layer"])
    records.main()
    assert json.loads(capsys.readouterr().out)["granularity"] == "layer"
    monkeypatch.setattr(sys, "argv", ["records", "recalibration", "channel"])
    with pytest.raises(SystemExit):
        records.main()
    assert "no record named `channel`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "benchmark", ["estimation", "judges", "recalibration", "sharded", "streaming", "paper_table"]
)
def test_every_benchmark_says_where_its_records_go(benchmark, capsys, monkeypatch):
    words = ["paper_table.__main__", "run"] if benchmark == "paper_table" else [benchmark]
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{words[0]}").main()
    assert ended.value.code == 0 and "--results" in capsys.readouterr().out
