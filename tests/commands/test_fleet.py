"""Many fine-tunes at once: outcomes, memory, resuming, and one that is broken."""

import json
import shutil
import time

import pytest
import yaml

from safegene_trl.commands import fleet as module
from safegene_trl.commands.main import main
from safegene_trl.estimation import Cost

from ..conftest import make_model, make_tokenizer


@pytest.fixture
def fleet(model_dir, vector_dir, task_file, tmp_path):
    """Five members: two whose gates differ, one without task data, one that is no model, one whose file is damaged."""
    for name in ("a", "b", "c"):
        make_model(seed=ord(name)).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a model")
    common = {
        "vector": str(vector_dir),
        "task_data": str(task_file),
        "max_utility_loss": 1000.0,
        "utility_weight": 0.0,
    }
    common |= {"num_benign_shots": 4, "num_safety_shots": 4, "num_task_shots": 4, "max_evaluations": 1}
    common |= {"num_test_prompts": 2, "max_new_tokens": 2, "gate": {"max_over_refusal": 1.0}, "allow_other_base": True}
    content = {
        "output_dir": str(tmp_path / "releases"),
        "processes": 2,
        "timeout_minutes": 4,
        "safegene": common,
        "models": [
            {"model_name_or_path": str(tmp_path / "a")},
            {"model_name_or_path": str(tmp_path / "b"), "name": "second"},
            {"model_name_or_path": str(tmp_path / "c"), "safegene": {"gate": {"min_refusal_rate": 0.9}}},
            {"model_name_or_path": str(tmp_path / "damaged")},
            {"model_name_or_path": str(tmp_path / "nowhere")},
        ],
    }

    def write(**changes):
        (tmp_path / "models.yaml").write_text(yaml.safe_dump(content | changes))
        return ["apply", "--fleet", str(tmp_path / "models.yaml")]

    return write


def outcomes(folder):
    return {entry["name"]: entry["outcome"] for entry in json.loads((folder / "fleet.json").read_text())}


def test_five_with_two_broken(fleet, tmp_path, capsys):
    assert main(fleet()) == 2
    releases = tmp_path / "releases"
    expected = {"a": "accepted", "second": "accepted", "c": "rejected", "damaged": "failed", "nowhere": "failed"}
    assert outcomes(releases) == expected
    printed = capsys.readouterr().out
    assert "limits are not kept" in printed and "damaged: " in printed and "nowhere: The model" in printed
    for name, outcome in expected.items():
        assert (releases / name / "model.safetensors").is_file() == (outcome == "accepted")
    stamp = (releases / "a" / "safegene_report.json").stat().st_mtime_ns
    # a second run does the failed ones only
    shutil.rmtree(tmp_path / "damaged")
    shutil.copytree(tmp_path / "a", tmp_path / "damaged")
    shutil.copytree(tmp_path / "a", tmp_path / "nowhere")
    assert main(fleet()) == 4
    assert outcomes(releases) == expected | {"damaged": "accepted", "nowhere": "accepted"}
    assert (releases / "a" / "safegene_report.json").stat().st_mtime_ns == stamp


def test_an_estimate_that_breaks_is_that_model_s_own_failure(monkeypatch, tmp_path):
    def estimate(argv, timed):
        if "bad" in argv[1]:
            raise KeyError("unforeseen")
        return {"save": Cost(0.0, 5)}

    monkeypatch.setattr("safegene_trl.commands.estimate.estimate_apply", estimate)
    members = [module.Member(name, tmp_path / f"{name}.yaml", tmp_path / name, "key") for name in ("bad", "good")]
    module._estimate(members)
    assert [member.outcome for member in members] == ["failed", ""]
    assert "KeyError: 'unforeseen'" in members[0].message and members[1].memory == 5


@pytest.fixture
def pool(monkeypatch, tmp_path):
    """Runs members whose process is a sleep, and notes how many run at a time."""
    most = []

    class Process:
        def __init__(self, command, env, **options):
            assert int(env["OMP_NUM_THREADS"]) >= 1 and env["MALLOC_MMAP_THRESHOLD_"] == "65536"
            self.ends, self.returncode = time.monotonic() + 0.3, 0

        def poll(self):
            return 0 if time.monotonic() > self.ends else None

        def kill(self):
            self.returncode = -9

        def wait(self):
            return self.returncode

    def run(memories, **settings):
        started, start = [], module._Pool._start

        def noted(self, member, device):
            start(self, member, device)
            started.append(member.name)
            most.append(sum(member.memory for member, _, _ in self.running.values()))

        monkeypatch.setattr(module.subprocess, "Popen", Process)
        monkeypatch.setattr(module._Pool, "_start", noted)
        fleet = module.Fleet(str(tmp_path), [{}], **settings)
        members = [
            module.Member(str(number), tmp_path / f"{number}.yaml", tmp_path / str(number), "", memory * 2**30)
            for number, memory in enumerate(memories)
        ]
        module._Pool(fleet, members, tmp_path / "fleet.json").run()
        return members, started, max(most, default=0) / 2**30

    return run


def test_memory_budget_is_kept(pool):
    members, started, most = pool([3, 5, 2, 20, 4], memory_gib=8, processes=8)
    assert [member.outcome for member in members] == ["accepted", "accepted", "accepted", "failed", "accepted"]
    assert "raise `memory_gib`" in members[3].message
    assert started[0] == "1" and sorted(started) == ["0", "1", "2", "4"] and most <= 8


def test_number_of_processes_and_time_limit(pool):
    members, _, most = pool([1, 1, 1, 1], memory_gib=100, processes=2)
    assert most == 2 and all(member.outcome == "accepted" for member in members)
    members, _, _ = pool([1], memory_gib=100, timeout_minutes=0.001)
    assert members[0].outcome == "failed" and "took longer" in members[0].message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "a list of `models`"),
        ({"models": [{"name": "x"}]}, "model_name_or_path"),
        ({"models": [{"model_name_or_path": "a/x"}, {"model_name_or_path": "b/x"}]}, "two models named x"),
        ({"models": [{"model_name_or_path": "a", "name": "../x"}]}, "cannot be a folder's name"),
        ({"memory": 3}, "memory_gib"),
        ({"memory_gib": -1}, "above 0"),
    ],
)
def test_a_bad_fleet_is_refused(fleet, changes, message, capsys):
    assert main(fleet(**changes)) == 2
    assert message in capsys.readouterr().err


def test_a_fleet_goes_alone(fleet, capsys):
    assert main([*fleet(), "--model_name_or_path", "x"]) == 2
    assert "goes alone" in capsys.readouterr().err
    assert main(["apply", "--fleet", "nowhere.yaml"]) == 2
