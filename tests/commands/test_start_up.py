"""Which large libraries a command imports: no more than it works with, because most of its start is
their import.

Their seconds are measured by `python -m benchmarks.start_up`.
"""

import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import safegene_trl
from safegene_trl.step.history import append_release

from ..conftest import make_model, make_vector
from ..step.test_history import release


LARGE = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "scipy",
    "accelerate",
    "matplotlib",
    "huggingface_hub",
    "numpy",
}
WITHOUT_TORCH = {"numpy"}
WITH_TORCH = {"huggingface_hub", "numpy", "torch"}
START = f"""
import sys
from safegene_trl.commands.main import main

code = 0
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("imported:", *sorted({LARGE!r} & set(sys.modules)), file=sys.stderr)
raise SystemExit(code)
"""


def imported(*words, code=0) -> set[str]:
    """The large libraries that a command has imported when it has done its work."""
    done = subprocess.run(
        [sys.executable, "-c", START, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    *_, last = done.stderr.splitlines()
    assert done.returncode == code and last.startswith("imported:"), done.stderr[-2000:]
    return set(last.split()[1:])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """`maker.pem` and `maker.pub`."""
    folder = tmp_path_factory.mktemp("keys")
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "maker.pem").write_bytes(private)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "maker.pub").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, tokenizer):
    """Two vectors of one family."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed in (3, 4):
        make_vector(make_model(), tokenizer, seed=seed).save_pretrained(folder / str(seed))
    return folder


def test_the_package_itself_imports_none():
    program = f"import sys, safegene_trl; print(*{LARGE!r} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        ).stdout
        == "\n"
    )


def test_what_is_public_is_there_when_it_is_asked_for():
    for name in safegene_trl.__all__:
        assert getattr(safegene_trl, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        safegene_trl.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("words", "libraries"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["history", "--help"], set()),
        (["completion", "bash"], set()),
        (["--version", "--json", "--quiet"], set()),
        *(([name, "--help"], WITHOUT_TORCH) for name in ("inspect", "verify", "sign")),
    ],
    ids=lambda value: " ".join(value),
)
def test_help_waits_for_no_large_library(words, libraries):
    assert imported(*words) == libraries


def test_a_word_that_is_no_command_is_told_at_once():
    assert imported("inspekt", code=2) == set()


def test_a_wrong_setting_of_an_audit_is_told_before_torch_is_imported():
    found = imported("audit", "v", "--forms", "story", code=2)
    assert not found & {"torch", "transformers", "peft"}


def test_history(tmp_path):
    for refused in (95, 94, 92, 91, 70):
        append_release(tmp_path / "history.jsonl", release(refused))
    assert imported("history", tmp_path / "history.jsonl", code=3) == set()


def test_inspect(vectors, tmp_path):
    assert imported("inspect", vectors / "3") == WITHOUT_TORCH
    report = tmp_path / "safegene_report.json"
    report.write_text(json.dumps({"status": "failed", "error": {"message": "no"}}))
    assert imported("inspect", report) == WITHOUT_TORCH
    assert imported("inspect", tmp_path / "nothing" / "at" / "all", code=2) == WITHOUT_TORCH | {
        "huggingface_hub"
    }


def test_sign_and_verify(vectors, keys):
    assert imported("sign", vectors / "4", "--private_key", keys / "maker.pem") == WITHOUT_TORCH
    assert imported("verify", vectors / "4", "--public_key", keys / "maker.pub") == WITHOUT_TORCH
    assert (
        imported("verify", vectors / "3", "--public_key", keys / "maker.pub", code=2)
        == WITHOUT_TORCH
    )


def test_similarity_and_combine(vectors, tmp_path):
    assert (
        imported("similarity", vectors / "3", vectors / "4", "--json", tmp_path / "cosines.json")
        == WITH_TORCH
    )
    assert (
        imported("combine", vectors / "3", vectors / "4", "--output_dir", tmp_path / "both")
        == WITH_TORCH
    )


def test_plots_import_nothing_but_matplotlib(vectors, tmp_path):
    words = ["similarity", vectors / "3", vectors / "4", "--plot", tmp_path / "cosines.png"]
    assert imported(*words) == WITH_TORCH | {"matplotlib"}


FIRST_WEIGHTS = f"""
import sys

def opened(event, arguments):
    if event == "open" and str(arguments[0]).endswith("model/model.safetensors"):
        print("weights:", *sorted({LARGE!r} & set(sys.modules)), file=sys.stderr)

sys.addaudithook(opened)
"""


def test_given_coefficients_open_the_weights_before_the_model_s_code_is_imported(
    vectors, model_dir, tmp_path
):
    words = ["apply", "--model_name_or_path", model_dir, "--coefficients", "0.5"]
    words += ["--safegene.vector", vectors / "3", "--safegene.output.output_dir", tmp_path / "out"]
    command = [sys.executable, "-c", FIRST_WEIGHTS + START, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    first = next(line for line in done.stderr.splitlines() if line.startswith("weights:"))
    *_, last = done.stderr.splitlines()
    assert done.returncode == 0 and (tmp_path / "out").is_dir(), done.stderr[-2000:]
    assert set(first.split()[1:]) == WITH_TORCH | {"trl"}
    assert not {"datasets", "matplotlib"} & set(last.split())  # one number needs no plot
