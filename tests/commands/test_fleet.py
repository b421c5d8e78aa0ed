"""Many fine-tunes at once: outcomes, memory, resuming, and one that is broken."""

import json
import os
import shutil
import signal
import sys
import time

import psutil
import pytest
import yaml

from safegene_trl.commands import fleet as module
from safegene_trl.commands import fleet_member, fleet_pool
from safegene_trl.commands.main import main
from safegene_trl.commands.process_tree import ProcessTree
from safegene_trl.estimation.cost import Cost
from safegene_trl.provenance import sha256_of_file

from ..conftest import in_groups, make_model, make_tokenizer


@pytest.fixture
def fleet(model_dir, vector_dir, task_file, tmp_path):
    """Five members: two whose gates differ, one without task data, one that is no model, one whose
    file is damaged.
    """
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
    common |= {
        "num_benign_shots": 4,
        "num_safety_shots": 4,
        "num_task_shots": 4,
        "max_evaluations": 1,
    }
    common |= {
        "num_test_prompts": 2,
        "max_new_tokens": 2,
        "gate": {"max_over_refusal": 1.0},
        "allow_other_base": True,
    }
    content = {
        "output_dir": str(tmp_path / "releases"),
        "processes": 2,
        "timeout_minutes": 4,
        "safegene": in_groups(common),
        "models": [
            {"model_name_or_path": str(tmp_path / "a")},
            {"model_name_or_path": str(tmp_path / "b"), "name": "second"},
            {
                "model_name_or_path": str(tmp_path / "c"),
                "safegene": {"gate": {"min_refusal_rate": 0.9}},
            },
            {"model_name_or_path": str(tmp_path / "damaged")},
            {"model_name_or_path": str(tmp_path / "nowhere")},
        ],
    }

    def write(**changes):
        (tmp_path / "models.yaml").write_text(yaml.safe_dump(content | changes))
        return ["apply", "--fleet", str(tmp_path / "models.yaml")]

    return write


def outcomes(folder):
    return {
        entry["name"]: entry["outcome"] for entry in json.loads((folder / "fleet.json").read_text())
    }


FORKED = """
import subprocess, sys
from safegene_trl.commands.main import main
from tests.faults.world import ForkedProcess
subprocess.Popen = ForkedProcess
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture(params=["forked", pytest.param("started", marks=pytest.mark.exhaustive)])
def run_fleet(request, interpreter, capsys):
    """Runs `safegene` with some words; its exit code and what it printed.

    Seven new interpreters take most of a minute, so members are forks of a process that has
    imported everything; `exhaustive` starts them as users do.
    """

    def run(words):
        if request.param == "started":
            return main(words), capsys.readouterr().out
        done = interpreter.run(FORKED, *words)
        return done.returncode, done.stdout

    return run


def test_five_with_two_broken(fleet, run_fleet, tmp_path):
    code, printed = run_fleet(fleet())
    assert code == 2
    releases = tmp_path / "releases"
    expected = {
        "a": "accepted",
        "second": "accepted",
        "c": "rejected",
        "damaged": "failed",
        "nowhere": "failed",
    }
    assert outcomes(releases) == expected
    assert (
        "limits are not kept" in printed
        and "damaged: " in printed
        and "nowhere: The model's folder" in printed
    )
    for name, outcome in expected.items():
        assert (releases / name / "model.safetensors").is_file() == (outcome == "accepted")
    stamp = (releases / "a" / "safegene_report.json").stat().st_mtime_ns
    # a second run does the failed ones only
    shutil.rmtree(tmp_path / "damaged")
    shutil.copytree(tmp_path / "a", tmp_path / "damaged")
    shutil.copytree(tmp_path / "a", tmp_path / "nowhere")
    code, printed = run_fleet([*fleet(), "--json"])
    assert code == 4
    told = {entry["name"]: entry["outcome"] for entry in json.loads(printed)["models"]}
    assert told == outcomes(releases) == expected | {"damaged": "accepted", "nowhere": "accepted"}
    assert (releases / "a" / "safegene_report.json").stat().st_mtime_ns == stamp


def test_what_a_result_rests_on_is_done_again_when_it_changes(fleet, tmp_path, task_file):
    words = fleet()
    read = module.Fleet.read(tmp_path / "models.yaml")

    def key():
        return fleet_member.member_of(read, read.models[0], {}).key

    first = key()
    assert key() == first
    task_file.write_text(task_file.read_text() + "\n")
    assert key() != first
    folder = tmp_path / "task" / "data"
    folder.mkdir(parents=True)
    read.models[0].setdefault("safegene", {}).setdefault("data", {})["task_data"] = str(
        folder.parent
    )
    before = key()
    (folder / "train.jsonl").write_text(task_file.read_text())
    assert key() != before
    del read.models[0]["safegene"]["data"]["task_data"]
    (tmp_path / "base").mkdir()
    adapter = tmp_path / "a" / "adapter_config.json"
    adapter.write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")})
    )
    before = key()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert key() != before
    adapter.unlink()
    before = key()  # a training that goes on saves below the model's folder
    (tmp_path / "a" / "checkpoint-9").mkdir()
    (tmp_path / "a" / "checkpoint-9" / "model.safetensors").touch()
    assert key() == before
    target = tmp_path / "releases" / "a"
    save_report(target)
    member = fleet_member.member_of(read, read.models[0], {})
    entry = {"key": member.key, "outcome": "accepted", "message": "", "seconds": 1.0}
    report = sha256_of_file(target / "safegene_report.json")
    assert (
        fleet_member.member_of(read, read.models[0], {"a": entry | {"report": report}}).outcome
        == "accepted"
    )
    done = fleet_member.member_of(
        read, read.models[0], {"a": entry | {"report": report, "seconds": 41.0}}
    )
    # The path of the output may hold any number.
    row = module._table([done]).splitlines()[1].replace(str(target), "")
    assert "already done" in row and "41" not in row
    done.done_before = False
    row = module._table([done]).splitlines()[1].replace(str(target), "")
    assert "41" in row and "already done" not in row
    save_report(target, reason="somebody else's")
    assert (
        fleet_member.member_of(read, read.models[0], {"a": entry | {"report": report}}).outcome
        == ""
        and words
    )


def test_an_estimate_that_breaks_is_that_model_s_own_failure(monkeypatch, tmp_path):
    def estimate(argv, timed):
        if "bad" in argv[1]:
            raise KeyError("unforeseen")
        if "exits" in argv[1]:
            raise SystemExit(2)
        return {"save": Cost(0.0, 5)}

    monkeypatch.setattr("safegene_trl.commands.estimate.estimate_apply", estimate)
    members = [
        fleet_member.Member(name, tmp_path / f"{name}.yaml", tmp_path / name, "key")
        for name in ("bad", "exits", "good")
    ]
    module._estimate(members)
    assert [member.outcome for member in members] == ["failed", "failed", ""]
    assert "KeyError: 'unforeseen'" in members[0].message and members[2].memory == 5


@pytest.fixture
def pool(monkeypatch, tmp_path):
    """Runs members whose process is a sleep, and notes how many run at a time."""
    most = []

    class Process:
        def __init__(self, command, log, env, inherited):
            assert int(env["OMP_NUM_THREADS"]) >= 1 and env["MALLOC_MMAP_THRESHOLD_"] == "65536"
            self.ends = time.monotonic() + 0.3

        def poll(self):
            return 0 if time.monotonic() > self.ends else None

        @staticmethod
        def end(groups):
            assert groups

    def run(memories, **settings):
        started, start = [], fleet_pool.Pool._start

        def noted(self, member, device):
            start(self, member, device)
            started.append(member.name)
            most.append(sum(member.memory for member, _, _ in self.running.values()))

        monkeypatch.setattr(fleet_pool, "ProcessTree", Process)
        monkeypatch.setattr(fleet_pool.Pool, "_start", noted)
        fleet = module.Fleet(str(tmp_path), [{}], **settings)
        members = []
        for number, memory in enumerate(memories):
            save_report(tmp_path / str(number))
            files = (tmp_path / f"{number}.yaml", tmp_path / str(number))
            members.append(fleet_member.Member(str(number), *files, "", memory * 2**30))
        fleet_pool.Pool(fleet, members, tmp_path / "fleet.json").run()
        return members, started, max(most, default=0) / 2**30

    return run


def save_report(folder, outcome="accepted", reason="well", name="safegene_report.json"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps({"decision": {"outcome": outcome, "reason": reason}}))


def test_memory_budget_is_kept(pool):
    members, started, most = pool([3, 5, 2, 20, 4], memory_gib=8, processes=8)
    assert [member.outcome for member in members] == [
        "accepted",
        "accepted",
        "accepted",
        "failed",
        "accepted",
    ]
    assert "raise `memory_gib`" in members[3].message
    assert started[0] == "1" and sorted(started) == ["0", "1", "2", "4"] and most <= 8


def test_number_of_processes_and_time_limit(pool):
    members, _, most = pool([1, 1, 1, 1], memory_gib=100, processes=2)
    assert most == 2 and all(member.outcome == "accepted" for member in members)
    members, _, _ = pool([1], memory_gib=100, timeout_minutes=0.001)
    assert members[0].outcome == "failed" and "took longer" in members[0].message


def test_devices_are_named_as_this_process_sees_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (gpu + 1, 9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert fleet_pool.free_memory() == {"3": 1, "GPU-5": 2}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert fleet_pool.free_memory() == {"0": 1, "1": 2}


def member_at(folder):
    return fleet_member.Member("a", folder / "fleet" / "a.yaml", folder / "a", "key")


def test_an_outcome_is_what_the_newest_report_says(tmp_path):
    """An earlier checkpoint is still there when a new one is rejected; and an exit code alone
    proves nothing.
    """
    member = member_at(tmp_path)
    fleet_pool.conclude(member, 0)
    assert member.outcome == "failed" and "left no report" in member.message
    save_report(member.target, reason="the earlier one")
    save_report(tmp_path, "rejected", "the new one", "a.failed.json")
    fleet_pool.conclude(member, 4)
    assert (member.outcome, member.message) == ("rejected", "the new one")
    assert str(member.target) not in module._table([member])
    (tmp_path / "a.failed.json").write_text("[1]")
    fleet_pool.conclude(member, 4)
    assert member.outcome == "failed"
    fleet_pool.conclude(member, -9)
    assert "SIGKILL, perhaps because memory ran out" in member.message


def test_the_last_words_of_a_log_are_the_message(tmp_path):
    member = member_at(tmp_path)
    member.recipe.parent.mkdir()
    member.log.write_bytes(b"\xff\n" * 10**6 + b"safegene apply: the disk is full\nafter that\n")
    fleet_pool.conclude(member, 2)
    assert member.message == "the disk is full"


CHILD = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [os.getpid(), subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
print(*children, flush=True)
time.sleep(0 if sys.argv[1] == "quick" else 600)
"""


def started(path, kind):
    """A process with two of its own, one of them in another group, and the ids of all three."""
    group = ProcessTree([sys.executable, "-c", CHILD, kind], path, os.environ)
    return group, ids_in(path)


def ids_in(path):
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.05)
    return [int(number) for number in path.read_text().split()]


def alive(ids):
    return [
        number
        for number in ids
        if psutil.pid_exists(number) and psutil.Process(number).status() != "zombie"
    ]


def gone(ids):
    until = time.monotonic() + 20
    while alive(ids) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(ids)


@pytest.mark.parametrize("kind", ["willing", "stubborn"])
def test_processes_end_with_all_that_they_started(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("safegene_trl.commands.process_tree.GRACE", 1.0)
    group, ids = started(tmp_path / "log", kind)
    assert alive(ids) == ids and group.poll() is None
    ProcessTree.end([group])
    assert gone(ids) and group.poll() in (-15, -9)


def test_what_a_process_leaves_in_its_group_ends_with_it(tmp_path):
    group, ids = started(tmp_path / "log", "quick")
    while (code := group.poll()) is None:
        time.sleep(0.05)
    assert code == 0 and gone(ids[:2])
    os.kill(ids[2], 9)  # it had a group of its own, and nobody knows of it any more


FLEET = """
import sys
from pathlib import Path
from safegene_trl.commands import fleet, fleet_pool
from safegene_trl.commands.main import main
from safegene_trl.commands.process_tree import ProcessTree
fleet._estimate = lambda members: None
group = fleet_pool.ProcessTree
child = Path(sys.argv[1]).with_name("child.py").read_text()
fleet_pool.ProcessTree = type("Fake", (group,), {"__init__": lambda self, command, *rest: group.__init__(self, [sys.executable, "-c", child, "x"], *rest)})
raise SystemExit(main(["apply", "--fleet", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_fleet_that_is_ended_ends_its_processes(
    number, code, fleet, interpreter, tmp_path, capsys
):
    (tmp_path / "child.py").write_text(CHILD)
    process = interpreter.start(FLEET, fleet(processes=1)[2])
    ids = ids_in(tmp_path / "releases" / "fleet" / "a.log")
    assert main(fleet()) == 2  # a second one on the same folder
    assert "Another fleet is at work" in capsys.readouterr().err and alive(ids) == ids
    process.send_signal(number)
    done = process.done()
    assert done.returncode == code and gone(ids)
    assert "Traceback" not in done.stderr and done.stderr.count("safegene apply: ") == 1
    assert outcomes(tmp_path / "releases") == {
        "a": "interrupted",
        "second": "",
        "c": "",
        "damaged": "",
        "nowhere": "",
    }


def test_a_process_of_a_killed_fleet_keeps_the_next_one_away(fleet, interpreter, tmp_path, capsys):
    (tmp_path / "child.py").write_text(CHILD)
    process = interpreter.start(FLEET, fleet(processes=1)[2])
    ids = ids_in(tmp_path / "releases" / "fleet" / "a.log")
    process.send_signal(signal.SIGKILL)
    assert process.done().returncode == -signal.SIGKILL
    assert main(fleet()) == 2
    assert "end it and the processes that it left" in capsys.readouterr().err
    for number in ids:
        os.kill(number, 9)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[1]",
        '[{"name": "a"}]',
        "\xff",
        '[{"name": "a", "key": "", "outcome": "", "message": "", "seconds": null}]',
    ],
)
def test_a_damaged_state_is_named(content, fleet, tmp_path, capsys):
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "fleet.json").write_text(content, encoding="latin-1")
    if content == "{}":
        content = '{"a": 1}'
        (tmp_path / "releases" / "fleet.json").write_text(content)
    assert main(fleet()) == 2
    assert "is damaged: remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "a list of `models`"),
        ({"models": [{"name": "x"}]}, "model_name_or_path"),
        (
            {"models": [{"model_name_or_path": "a/x"}, {"model_name_or_path": "b/x"}]},
            "two models named x",
        ),
        ({"models": [{"model_name_or_path": "a", "name": "../x"}]}, "cannot be a folder's name"),
        ({"models": {}}, "a list of `models`"),
        ({"models": ["a/x"]}, "must be a block"),
        ({"models": [{"model_name_or_path": "a/x", "name": 3}]}, "must be a string"),
        ({"models": [{"model_name_or_path": "a/x", "name": "fleet"}]}, "cannot be a folder's name"),
        (
            {"models": [{"model_name_or_path": "a/x", "name": "fleet.json"}]},
            "cannot be a folder's name",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "name": "a\x1b[2J"}]},
            "cannot be a folder's name",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "name": "x" * 201}]},
            "cannot be a folder's name",
        ),
        ({"models": [{"model_name_or_path": ["a/x"]}]}, "a directory or hub id"),
        (
            {"models": [{"model_name_or_path": "a/x", "safegen": {}}]},
            "model x: Unknown key `safegen`",
        ),
        ({"models": [{"model_name_or_path": "a/x", "fleet": "y"}]}, "model x: Unknown key `fleet`"),
        (
            {"models": [{"model_name_or_path": "a/x", "output_dir": None}]},
            "model x: Unknown key `output_dir` in its block; did you mean `safegene.output.output_dir`?",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "safegene": {"data": {"sampel": 3}}}]},
            "model x: Unknown key `sampel` in the data block; did you mean",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "dtype": "int3"}]},
            "model x: `dtype` is 'int3'",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "safegene": []}]},
            "model x: `safegene` must be a block",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "safegene": {"sede": 1}}]},
            "model x: Unknown key `sede`",
        ),
        (
            {"models": [{"model_name_or_path": "a/x", "safegene": {"dry_run": True}}]},
            "model x: `dry_run` writes nothing",
        ),
        (
            {
                "models": [{"model_name_or_path": "a/x", "coefficients": 0.5}],
                "safegene": {"vector": "v", "gate": {"min_refusal_rate": 0.9}},
            },
            "model x: `gate.min_refusal_rate` is set beside `coefficients`",
        ),
        ({"output_dir": "~/releases"}, "`~` stands for no folder here"),
        ({"safegene": []}, "`safegene` is []"),
        ({"memory": 3}, "memory_gib"),
        ({"memory_gib": -1}, "above 0"),
        ({"memory_gib": "8"}, "without quotes"),
        ({"processes": 0.5}, "a whole number"),
        ({"processes": True}, "a whole number"),
        ({"processes": 0}, "at least 1"),
        ({"timeout_minutes": float("nan")}, "a finite number"),
        ({"timeout_minutes": None}, "has no value"),
    ],
)
def test_a_bad_fleet_is_refused(fleet, changes, message, capsys, tmp_path):
    assert main(fleet(**changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "releases").exists()


def test_a_double_key_is_refused(fleet, tmp_path, capsys):
    words = fleet()
    with (tmp_path / "models.yaml").open("a") as file:
        file.write("processes: 3\n")
    assert main(words) == 2
    assert "has the key `processes` twice" in capsys.readouterr().err


def places(tmp_path, first=None, second=None, **names):
    def entry(name, block):
        return {
            "model_name_or_path": str(tmp_path / name),
            "safegene": in_groups(block or {}),
            **names.get(name, {}),
        }

    return {"models": [entry("a", first), entry("b", second)]}


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ({"output_dir": "out/x"}, {"output_dir": "out/x/"}, {}),
        ({"output_dir": "out"}, {"output_dir": "out/x"}, {}),
        ({"output_dir": "link/x"}, {"output_dir": "out/x"}, {}),
        ({"output_dir": "releases/b"}, {}, {}),
        ({"output_dir": "releases/b.failed.json"}, {}, {}),
        ({"output_dir": "releases/b.failed.html"}, {}, {}),
        ({}, {}, {"output_dir": "one"}),
        ({"output_dir": "b"}, {}, {}),  # the other's fine-tune
        ({"output_dir": "out"}, {"history": "out/history.jsonl"}, {}),
        ({"output_dir": "releases"}, {}, {}),
        ({"output_dir": "releases/fleet/x"}, {}, {}),
        ({"output_dir": "."}, {}, {}),
        ({"output_dir": "models.yaml"}, {}, {}),
    ],
)
def test_places_that_are_one_are_refused(
    first, second, common, fleet, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "history.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    words = fleet(
        safegene=in_groups({"vector": "v", "task_data": "t", **common}),
        **places(tmp_path, first, second),
    )
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "output_dir" in error or "choose another" in error or "another `name`" in error
    assert sorted(tmp_path.rglob("*")) == sorted({*before, tmp_path / "models.yaml"})


def test_a_members_settings_go_before_the_common_ones(fleet, tmp_path, caplog):
    common = {
        "vector": "v",
        "data": {"task_data": "t"},
        "max_evaluations": 3,
        "gate": {"max_over_refusal": 1.0},
    }
    own = {"data": {"num_task_shots": 4}, "task_data": "own", "gate": {"min_refusal_rate": 0.5}}
    fleet(safegene=common, models=[{"model_name_or_path": "a", "safegene": own}])
    found = module.Fleet.read(tmp_path / "models.yaml")
    assert found.recipe(found.models[0])["safegene"] == {
        "output": {"output_dir": str(tmp_path / "releases" / "a")},
        "vector": "v",
        "data": {"task_data": "own", "num_task_shots": 4},
        "search": {"max_evaluations": 3},
        "gate": {"min_refusal_rate": 0.5},
    }
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "`max_evaluations` is now `search.max_evaluations`, `task_data` is now `data.task_data`."
        in said
    )


def test_the_fleet_file_is_never_overwritten(fleet, tmp_path, capsys):
    place = tmp_path / "releases" / "fleet" / "a.yaml"
    place.parent.mkdir(parents=True)
    fleet()
    shutil.move(tmp_path / "models.yaml", place)
    text = place.read_text()
    assert main(["apply", "--fleet", str(place)]) == 2
    assert (
        "would be overwritten by the recipe of a" in capsys.readouterr().err
        and place.read_text() == text
    )


def test_a_fleet_goes_alone(fleet, capsys):
    assert main([*fleet(), "--model_name_or_path", "x"]) == 2
    assert "goes alone" in capsys.readouterr().err
    assert main(["apply", "--fleet", "nowhere.yaml"]) == 2


@pytest.mark.parametrize("own", [{"output": {"output_dir": None}}, {"output_dir": None}])
def test_no_place_of_its_own_is_the_fleets_default(own, fleet, tmp_path):
    settings = {"vector": "v", "data": {"task_data": "t"}}
    fleet(safegene=settings, models=[{"model_name_or_path": "a", "safegene": own}])
    found = module.Fleet.read(tmp_path / "models.yaml")
    output = found.recipe(found.models[0])["safegene"]["output"]
    assert output == {"output_dir": str(tmp_path / "releases" / "a")}
