"""A failing rank ends the safety step on every rank, says who and why, and leaves nothing
half-written.
"""

import json
import os
import shutil

import pytest
from transformers import AutoModelForCausalLM

from ..conftest import make_model, make_tokenizer, make_vector
from .launching import ranks


pytestmark = pytest.mark.timeout(400)
TIMEOUT = 180  # the process group's own is 60 seconds

# What rank 0 and rank 1 raise, and what the one that is well says about the other.
AGREED = {
    "validation": ("RuntimeError", "Fault", "Rank 1 of 2 failed: Fault: broken on purpose"),
    "corrupt vector": (
        "PeerError",
        "VectorError",
        "Rank 1 of 2 failed: adapter_model.safetensors of the safety vector",
    ),
    "other data": (
        "CalibrationDataError",
        "CalibrationDataError",
        "Rank 1 has other samples than rank 0",
    ),
    "other settings": (
        "CalibrationDataError",
        "CalibrationDataError",
        "Rank 1 has other SafeGene settings than rank 0",
    ),
    "disk": ("OutputError", "PeerError", "Rank 0 of 2 failed: Writing the output failed"),
    "none": (None, None, ""),
}
BEFORE_TRAINING = ("validation", "corrupt vector", "other data", "other settings")
BACKENDS = ("ddp", "zero3", "fsdp2")
QUICK = (("ddp", None), ("zero3", "kill"))


def marked(backend, fault=None):
    marks = () if (backend, fault) in QUICK else (pytest.mark.exhaustive,)
    values = (backend,) if fault is None else (backend, fault)
    return pytest.param(*values, marks=marks, id="-".join(values))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A model, its vector, a truncated copy of it, and two folders with other data under one name."""
    root = tmp_path_factory.mktemp("family")
    make_model().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    make_vector(make_model(), make_tokenizer()).save_pretrained(root / "vector")
    shutil.copytree(root / "vector", root / "corrupt")
    os.truncate(root / "corrupt" / "adapter_model.safetensors", 1000)
    for rank in (0, 1):
        rows = [
            {"prompt": f"how do i forbid item {i * (rank + 1)}", "response": "sorry"}
            for i in range(12)
        ]
        (root / f"rank-{rank}").mkdir()
        (root / f"rank-{rank}" / "safety.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return root


def plan_of(family, root, backend, fault, alone=False):
    out = root / f"{fault}".replace(" ", "-")
    out.mkdir()
    return {
        "backend": backend,
        "fault": fault,
        "alone": alone,
        "lora": False,
        "dtype": "float32",
        "model": str(family / "model"),
        "out": str(out),
        "arguments": {"save_strategy": "steps", "save_steps": 2},
        "config": {"num_test_prompts": 0}
        | ({"safety_data": "safety.jsonl"} if fault == "other data" else {}),
        "configs": [{}, {"seed": 1} if fault == "other settings" else {}],
        "vectors": [
            str(family / "vector"),
            str(family / ("corrupt" if fault == "corrupt vector" else "vector")),
        ],
        "folders": [str(family / "rank-0"), str(family / "rank-1")],
    }


def launch(forked, root, plans):
    (root / "plans.json").write_text(json.dumps(plans))
    worker = ["-m", "tests.distributed.failing_worker", str(root / "plans.json")]
    return forked(ranks(*worker), TIMEOUT)


def agreed(backend):
    """What each fault is met by; last comes none: after all the failures the same processes still
    work together.
    """
    said = "The safety step failed unexpectedly (RuntimeError: Rank 1 of 2 failed: Fault: broken on purpose)"
    together = {"recalibration": ("UnexpectedError", "UnexpectedError", said)}
    faults = AGREED | (together if backend == "ddp" else {})
    faults["none"] = faults.pop("none")
    return faults


def of_the_search(backend):
    return ["search", "later in the search", *(["memory"] if backend == "ddp" else []), "none"]


@pytest.fixture(scope="module")
def launched(forked, family, tmp_path_factory):
    """One launch of a backend with all faults that both ranks survive; the folder of `agreed` and
    that of `of_the_search`.
    """
    done = {}

    def folders(backend):
        if backend not in done:
            root = tmp_path_factory.mktemp(backend)
            places = root / "agreed", root / "search"
            for place in places:
                place.mkdir()
            plans = [plan_of(family, places[0], backend, fault) for fault in agreed(backend)]
            plans += [
                plan_of(family, places[1], backend, fault) for fault in of_the_search(backend)
            ]
            done[backend] = (*places, launch(forked, root, plans))
        assert done[backend][2].returncode == 0, done[backend][2].stdout[-6000:]
        return done[backend][:2]

    return folders


@pytest.mark.parametrize("backend", [marked(backend) for backend in BACKENDS])
def test_ranks_fail_together_and_can_go_on(backend, launched):
    folder, _ = launched(backend)
    for fault, (on_main, on_other, said) in agreed(backend).items():
        out = folder / fault.replace(" ", "-")
        main, other = (json.loads((out / f"result-{rank}.json").read_text()) for rank in (0, 1))
        assert (main["kind"], other["kind"]) == (on_main, on_other), fault
        assert said in (other if fault == "disk" else main)["message"]
        assert main["steps"] == other["steps"] == (0 if fault in BEFORE_TRAINING else 2)
        left = sorted(path.name for path in out.iterdir() if "safeguarded" in path.name)
        kinds = {
            "disk": ("coefficients.png", "html", "json"),
            "recalibration": ("html", "json"),
        }.get(fault, ())
        failed = [f"safeguarded.failed.{kind}" for kind in kinds]
        assert left == (["safeguarded"] if fault == "none" else failed), fault
        if fault not in BEFORE_TRAINING:
            AutoModelForCausalLM.from_pretrained(out / "checkpoint-2")


@pytest.mark.parametrize("backend", [marked(backend) for backend in BACKENDS])
def test_what_rank_0_meets_in_the_search_frees_the_others(backend, launched):
    """Within seconds, not after the process group's time-out; and all ranks start again where
    memory ran out on one.
    """
    _, folder = launched(backend)
    for fault in of_the_search(backend):
        out = folder / fault.replace(" ", "-")
        main, other = (json.loads((out / f"result-{rank}.json").read_text()) for rank in (0, 1))
        assert max(main["seconds"], other["seconds"]) < 30, fault
        if "search" in fault:
            assert main["kind"] == other["kind"] == "UnexpectedError"
            assert "(Fault: broken on purpose)" in main["message"]
            assert "Rank 0 of 2 failed: Fault: broken on purpose" in other["message"]
            assert not (out / "safeguarded").exists()
        else:
            assert main["kind"] is other["kind"] is None and (out / "safeguarded").is_dir(), fault


@pytest.mark.parametrize(
    ("backend", "fault"),
    [marked(b, f) for b in BACKENDS for f in ("recalibration", "gathering", "kill")],
)
def test_failure_among_collectives_ends_the_job(backend, fault, forked, family, tmp_path):
    done = launch(forked, tmp_path, [plan_of(family, tmp_path, backend, fault, alone=True)])
    assert done.returncode != 0
    if fault == "kill":  # the launcher names the rank that it sees first: 1, or 0, left alone by it
        assert "rank 1 kills itself" in done.stdout
        assert "SIGKILL" in done.stdout or "this was rank 0 of 2" in done.stdout
    else:
        assert "Fault: broken on purpose" in done.stdout and "this was rank 1 of 2" in done.stdout
    out = tmp_path / fault
    assert not (out / "safeguarded").exists()
    assert not list(out.glob("result-*.json"))
    AutoModelForCausalLM.from_pretrained(out / "checkpoint-2")
