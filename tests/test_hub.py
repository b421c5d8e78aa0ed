"""Uploading, to a local stand-in of the hub's API; in processes of their own, because the hub's
address is read at import.
"""

import pytest
from huggingface_hub import ModelCard

from .conftest import options_of
from .hub import Hub
from .interpreter import Interpreter


SAFEGENE = (
    "import sys; from safegene_trl.commands.main import main; raise SystemExit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def served():
    with Hub() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_made_up"}
        interpreter = Interpreter(
            environment | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        )
        yield server, interpreter
        interpreter.end()


@pytest.fixture
def hub(served):
    """An empty one."""
    server, _ = served
    server.repositories.clear()
    server.stored.clear()
    server.commits, server.denied = 0, False
    return server


@pytest.fixture
def python(served, hub):
    return served[1].run


def test_a_vector_is_uploaded_whole(hub, python, vector_dir):
    script = f"from safegene_trl import SafetyVector; SafetyVector.from_pretrained({str(vector_dir)!r}).push_to_hub('me/vector')"
    done = python(script)
    assert done.returncode == 0, done.stderr[-2000:]
    files = hub.repositories["me/vector"]["files"]
    for file in vector_dir.iterdir():
        if file.name != "README.md":
            assert files[file.name] == file.read_bytes(), file.name
    card = ModelCard(files["README.md"].decode())
    assert (
        card.data.base_model_relation == "adapter"
        and "Subtracting it would remove refusals" in card.text
    )


@pytest.mark.parametrize("denied", [False, True])
def test_a_safeguarded_checkpoint_is_uploaded_with_its_evidence(
    hub, python, denied, model_dir, vector_dir, task_file, tmp_path
):
    hub.denied = denied
    target = tmp_path / "release"
    settings = {
        "vector": vector_dir,
        "task_data": task_file,
        "output_dir": target,
        "hub_model_id": "me/release",
    }
    settings |= {
        "gate.max_over_refusal": 1.0,
        "gate.write_rejected": "true",
        "max_evaluations": 1,
        "num_benign_shots": 4,
        "num_safety_shots": 4,
        "num_task_shots": 4,
        "num_test_prompts": 4,
        "max_new_tokens": 4,
    }
    words = options_of(settings)
    done = python(SAFEGENE, "apply", "--model_name_or_path", model_dir, *words)
    assert done.returncode == (2 if denied else 0), done.stderr[-2000:]
    assert (target / "model.safetensors").is_file()
    if denied:
        assert (
            "is finished, but uploading it to me/release failed" in done.stderr and not hub.commits
        )
        return
    repository = hub.repositories["me/release"]
    assert repository["private"] and hub.commits == 1
    assert repository["files"] == {file.name: file.read_bytes() for file in target.iterdir()}
    card = ModelCard(repository["files"]["README.md"].decode())
    assert card.data.base_model_relation == "merge" and "accepted" in card.text
    assert {result.metric_type for result in card.data.eval_results} == {
        "refusal_rate",
        "over_refusal",
        "incoherent",
        "unjudged",
    }


CHECK = """
import sys
from safegene_trl.errors import OutputError
from safegene_trl.checkpoints.hub import check_hub, upload
from pathlib import Path
for repository in sys.argv[2:]:
    try:
        check_hub(repository)
        print("well")
    except OutputError as error:
        print(error)
upload(Path(sys.argv[1]), "new", True)
"""


def test_the_hub_is_asked_before_the_run_and_nothing_is_made_there(hub, python, vector_dir):
    hub.repositories["other/theirs"] = {"private": False, "files": {}}
    names = ["me/new", "new", "other/new", "other/theirs", "a/b/c", "-bad-"]
    done = python(CHECK.partition("upload(Path")[0], vector_dir, *names)
    assert list(hub.repositories) == ["other/theirs"] and hub.commits == 0
    found = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert found["me/new"] == found["new"] == found["other/theirs"] == "well"
    assert "cannot make it in other" in found["other/new"]
    assert all("cannot be looked up" in found[name] for name in ("a/b/c", "-bad-"))


def test_a_name_without_a_namespace_is_one_of_the_user_s_own(hub, python, vector_dir):
    done = python(CHECK, vector_dir, "new")
    assert done.returncode == 0 and done.stdout == "well\n", done.stderr[-2000:]
    assert list(hub.repositories) == ["me/new"] and hub.commits == 1
