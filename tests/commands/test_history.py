"""`safegene history`."""

import json
import os
from pathlib import Path

import pytest

from safegene_trl.commands.main import main
from safegene_trl.errors import SafeGeneError
from safegene_trl.judges.intervals import Rate
from safegene_trl.step.history import append_release
from safegene_trl.step.history_file import seal_path


def release(refused, outcome="accepted"):
    share = Rate(refused, 100).to_dict()
    low = Rate(10, 100).to_dict()
    return {
        "time": "2030-01-01T00:00:00+00:00",
        "output": f"out/{refused}",
        "outcome": outcome,
        "reason": "",
        "vector": {"name": "v", "sha256": None},
        "base": {"name": "model", "revision": None, "sha256": None, "carries_vector": False},
        "coefficients": {},
        "held_out": None,
        "report": "0" * 64,
        "before": {"refusal_rate": Rate(30, 100).to_dict(), "over_refusal": low, "incoherent": low},
        "after": {"refusal_rate": share, "over_refusal": low, "incoherent": low},
        "utility_loss": {"share": 0.012, "low": 0.0, "high": 0.02, "count": 50},
    }


def test_table_warning_and_plot(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    for refused, outcome in ((92, "accepted"), (20, "rejected"), (91, "accepted_best_effort")):
        append_release(path, release(refused, outcome))
    assert main(["history", str(path), "--plot", str(tmp_path / "line.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 4
        and "30% → 92%" in lines[1]
        and "+1.2%" in lines[1]
        and "rejected" in lines[2]
    )
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    append_release(path, release(60))
    assert main(["history", str(path)]) == 3
    assert "warning: The newest release refuses 60% of 100" in capsys.readouterr().out


def test_releases_without_measurements(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    append_release(path, release(90) | {"before": None, "after": None, "utility_loss": None})
    assert main(["history", str(path)]) == 0 and "out/90" in capsys.readouterr().out


def test_no_history(tmp_path, capsys):
    assert main(["history", str(tmp_path / "none.jsonl")]) == 2
    said = capsys.readouterr().err
    assert f"There is no file {tmp_path / 'none.jsonl'}: name the one that `output.history`" in said
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    assert main(["history", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl is no history of releases: name" in capsys.readouterr().err
    damaged = {key: value for key, value in release(90).items() if key != "time"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(damaged) + "\n")
    assert main(["history", str(tmp_path / "bad.jsonl")]) == 2
    assert "`time` in line 1 of the history" in capsys.readouterr().err


def test_a_history_whose_seal_is_gone_is_sealed_on_demand(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    append_release(path, release(90))
    (tmp_path / "history.jsonl.seal").unlink()
    assert main(["history", str(path)]) == 2 and "--seal" in capsys.readouterr().err
    assert main(["history", str(path), "--seal"]) == 0 and main(["history", str(path)]) == 0
    line = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in line.items() if key != "sequence"}) + "\n"
    )
    (tmp_path / "history.jsonl.seal").unlink()
    capsys.readouterr()
    assert main(["history", str(path)]) == 0 and "warning: The history" in capsys.readouterr().out


def test_a_page_for_people(tmp_path, capsys):
    path, page = tmp_path / "history.jsonl", tmp_path / "pages" / "line.html"
    hostile = {"output": "out/<script>alert(1)</script>\u202e", "repair": "vector+touch-up"}
    for extra, outcome in (({}, "accepted"), (hostile, "accepted"), ({}, "rejected")):
        append_release(path, release(90, outcome) | extra)
    assert main(["history", str(path), "--html", str(page)]) == 0
    assert "accepted (vector+touch-up)" in capsys.readouterr().out
    text = page.read_text()
    assert "Newest release: rejected" in text and "3 releases" in text
    assert text.count("<td>vector+touch-up</td>") == 1 and text.count("30% → 90%") == 3
    assert "<script" not in text and "\u202e" not in text and "polyline" in text
    append_release(path, release(10))
    assert main(["history", str(path), "--html", str(page)]) == 3
    assert "Warning: The newest release refuses 10% of 100" in page.read_text()


def test_numbers_for_prometheus(tmp_path):
    path, numbers = tmp_path / "history.jsonl", tmp_path / "safegene.prom"
    unmeasured = {"restored": None}
    for outcome in ("rejected", "accepted"):
        append_release(path, release(92, outcome) | unmeasured)
    assert main(["history", str(path), "--prometheus", str(numbers)]) == 0
    text = numbers.read_text()
    found = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert found['safegene_releases{outcome="rejected"}'] == 1
    assert found['safegene_release_outcome{outcome="accepted"}'] == 1
    assert found['safegene_release_outcome{outcome="rejected"}'] == 0
    assert found["safegene_release_time_seconds"] == 1893456000
    assert found['safegene_refusal_rate{side="before"}'] == 0.3
    assert found['safegene_refusal_rate{side="after"}'] == 0.92
    assert found['safegene_refusal_rate_low{side="after"}'] < 0.92
    assert found['safegene_refusal_rate_count{side="after"}'] == 100
    assert found["safegene_utility_loss"] == 0.012 and found["safegene_drift_warnings"] == 0
    assert not any("restored" in key for key in found)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert {key.partition("{")[0] for key in found} == set(names)


def test_what_is_read_and_what_is_no_file_is_not_written_over(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    append_release(path, release(90))
    pipe, place = tmp_path / "pipe", tmp_path / "page"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(path)
    kept = {file: file.read_bytes() for file in (path, seal_path(path))}
    for options, message in (
        (["--html", path], f"{path} is read by the same command: choose another place."),
        (["--plot", tmp_path / "link"], "link is read by the same command"),
        (["--prometheus", seal_path(path)], "is read by the same command"),
        (["--html", place, "--prometheus", place], f"{place} is written already by the same"),
        (["--prometheus", pipe], f"{pipe} is no plain file: choose another place."),
        (["--html", "/dev/null"], "/dev/null is no plain file: choose another place."),
        (["--html", ""], "cannot be made as a file: choose another place."),
        (["--html", tmp_path], "choose another place."),
    ):
        assert main(["history", str(path), *map(str, options)]) == 2
        assert message in capsys.readouterr().err
    assert {file: file.read_bytes() for file in kept} == kept
    assert pipe.is_fifo() and not place.exists() and Path("/dev/null").is_char_device()


def test_a_release_without_a_measurement_is_not_shown_as_if_it_had_one(tmp_path, capsys):
    path, page = tmp_path / "history.jsonl", tmp_path / "line.html"
    append_release(path, release(90) | {"before": None, "after": None, "utility_loss": None})
    assert main(["history", str(path), "--html", str(page)]) == 0
    assert "accepted without a measurement of refusals" in capsys.readouterr().out
    text = page.read_text()
    said = "accepted without a measurement of refusals"
    assert f'<h1 class="fair">Newest release: {said}</h1>' in text
    assert f"<td>A{said[1:]}</td>" in text


def test_times_are_told_in_utc_whatever_zone_they_are_written_in(tmp_path, capsys):
    path, numbers = tmp_path / "history.jsonl", tmp_path / "numbers.prom"
    for time in ("2030-01-01T03:00:00+02:00", "2030-01-01T01:00:00"):
        append_release(path, release(90) | {"time": time})
    assert main(["history", str(path), "--prometheus", str(numbers)]) == 0
    assert capsys.readouterr().out.count("2030-01-01 01:00") == 2
    assert "safegene_release_time_seconds 1893459600.0" in numbers.read_text()
    with pytest.raises(SafeGeneError, match="`time` in the new release's line is not as it must"):
        append_release(path, release(90) | {"time": "yesterday"})
