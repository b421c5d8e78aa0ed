"""`safegene evaluate` in two processes: the prompts are shared out, and the answers are those of
one process.
"""

import json

import pytest

from safegene_trl.commands.main import main
from safegene_trl.evaluation.evaluate import GENERATIONS, RESULT

from ..conftest import BENIGN, HARMFUL, make_model, make_tokenizer, save_utility_task
from .launching import MODULE


pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of an evaluation with a utility task of its own."""
    root = tmp_path_factory.mktemp("evaluation")
    make_model().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for name, prompts in (("forbidden", HARMFUL), ("cooking", BENIGN)):
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
        )
    save_utility_task(root / "tasks")
    words = ["--model_name_or_path", root / "model", "--harmful_data", root / "forbidden.jsonl"]
    words += ["--benign_data", root / "cooking.jsonl", "--max_new_tokens", 4, "--batch_size", 2]
    return [str(word) for word in words], ["--tasks", "boxes", "--tasks_dir", str(root / "tasks")]


def answers(folder):
    rows = [json.loads(line) for line in (folder / GENERATIONS).read_text().splitlines()]
    return {row["key"]: row["answer"] for row in rows}


@pytest.mark.exhaustive
def test_ranks_share_the_prompts(forked, options, tmp_path):
    words, task = options
    assert main(["evaluate", *words, *task, "--output_dir", str(tmp_path / "alone")]) == 0
    for config, extra in (("ddp", task), ("zero3", [])):
        launch = [*MODULE, "evaluate", "--accelerate_config", config, "--num_processes", "2"]
        done = forked([*launch, *words, *extra, "--output_dir", str(tmp_path / config)])
        assert done.returncode == 0, done.stdout[-4000:]
        assert answers(tmp_path / config) == answers(tmp_path / "alone"), config
    results = [
        json.loads((tmp_path / name / RESULT).read_text()) for name in ("alone", "ddp", "zero3")
    ]
    assert results[0]["judges"] == results[1]["judges"] == results[2]["judges"]
    assert results[0]["utility"]["results"] == results[1]["utility"]["results"]


@pytest.mark.exhaustive
def test_utility_of_a_sharded_model_is_refused_by_name(forked, options, tmp_path):
    words, task = options
    launch = [*MODULE, "evaluate", "--accelerate_config", "zero3", "--num_processes", "2"]
    done = forked([*launch, *words, *task, "--output_dir", str(tmp_path / "out")])
    assert done.returncode == 2, done.stdout[-4000:]
    assert "Utility tasks need the whole model in one process" in done.stdout
