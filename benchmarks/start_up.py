"""How long every small command takes from its start to its end, on a vector and a model that are
next to nothing, so that it is start-up.

    python -m benchmarks.start_up --output benchmarks/results/start_up.json

Seconds of wall clock, the best of `--repetitions` runs, each a new Python, after one that warms the
disk's cache. Beside them an empty Python, and the imports of torch and transformers, as they were
on the machine at the time. `apply --coefficients` is timed twice: until it opens the first weight
file, and until it ends. Which libraries a command imports is held by
`tests/commands/test_start_up.py`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from safegene_trl.provenance import software_versions
from safegene_trl.step.history import append_release
from tests.conftest import make_model, make_tokenizer, make_vector
from tests.step.test_history import release


AIMS = {
    "import safegene_trl": 0.2,
    "safegene --help": 0.3,
    "safegene --version": 0.3,
    "safegene history": 0.3,
    "safegene inspect REPORT": 1.5,
    "safegene inspect VECTOR": 1.5,
    "safegene sign": 1.5,
    "safegene verify": 1.5,
    "safegene similarity": 1.5,
    "safegene combine": 1.5,
    "safegene apply --coefficients (first weight file)": 2.5,
}
UNTIL_FIRST_WEIGHTS = """
import os, sys, time

def opened(event, arguments):
    if event == "open" and str(arguments[0]).endswith(os.path.join("model", "model.safetensors")):
        print("first weights", time.time(), file=sys.stderr, flush=True)

sys.addaudithook(opened)
from safegene_trl.commands.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    load = [os.getloadavg()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder)
        seconds = {
            name: best(words, folder, arguments.repetitions)
            for name, words in programs(folder).items()
        }
        seconds |= best_apply(folder, arguments.repetitions)
    load.append(os.getloadavg())
    record = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "aims": AIMS,
        "repetitions": arguments.repetitions,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "load_average_before_and_after": load,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "software": software_versions(),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, value in record["seconds"].items():
        print(f"{value:7.2f} s  {name}")


def make_inputs(folder: Path) -> None:
    """A model, two vectors of its family, the first one signed, a history, a report and keys."""
    tokenizer, key, pem = (
        make_tokenizer(),
        ec.generate_private_key(ec.SECP256R1()),
        serialization.Encoding.PEM,
    )
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, seed in (("one", 3), ("two", 4)):
        make_vector(make_model(), tokenizer, seed=seed).save_pretrained(folder / name)
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "maker.pem").write_bytes(private)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "maker.pub").write_bytes(public)
    for refused in (92, 91, 93, 90, 92):
        append_release(folder / "history.jsonl", release(refused))
    report = {"status": "failed", "error": {"message": "It was only an example."}}
    (folder / "safegene_report.json").write_text(json.dumps(report), encoding="utf-8")


def programs(folder: Path) -> dict[str, list[Any]]:
    """What Python is asked to do, by name; one that signs comes before one that verifies."""
    one, two = folder / "one", folder / "two"
    commands = {
        "safegene --help": ["--help"],
        "safegene --version": ["--version"],
        "safegene history": ["history", folder / "history.jsonl"],
        "safegene inspect REPORT": ["inspect", folder / "safegene_report.json"],
        "safegene inspect VECTOR": ["inspect", one],
        "safegene sign": ["sign", one, "--private_key", folder / "maker.pem"],
        "safegene verify": ["verify", one, "--public_key", folder / "maker.pub"],
        "safegene similarity": ["similarity", one, two],
        "safegene combine": [
            "combine",
            one,
            two,
            "--overwrite_output_dir",
            "--output_dir",
            folder / "both",
        ],
    }
    plain = {
        "python -c pass": "pass",
        "import torch": "import torch",
        "import transformers": "import transformers",
        "import safegene_trl": "import safegene_trl",
    }
    asked = {name: ["-c", program] for name, program in plain.items()}
    return asked | {name: ["-m", "safegene_trl", *words] for name, words in commands.items()}


def best(words: list[Any], folder: Path, repetitions: int) -> float:
    """Seconds of the fastest run."""
    return min([run(words, folder)[0] for _ in range(repetitions + 1)][1:])


def best_apply(folder: Path, repetitions: int) -> dict[str, float]:
    """Seconds until `apply --coefficients` opens the first weight file, and until it ends."""
    words = ["apply", "--model_name_or_path", folder / "model", "--coefficients", "0.5"]
    words += ["--safegene.vector", folder / "one", "--safegene.output.output_dir", folder / "out"]
    until_first, until_end = [], []
    for _ in range(repetitions + 1):
        started = time.time()
        whole, said = run(["-c", UNTIL_FIRST_WEIGHTS, *words], folder)
        first = next(line for line in said.splitlines() if line.startswith("first weights"))
        until_first.append(float(first.split()[-1]) - started)
        until_end.append(whole)
    name = "safegene apply --coefficients"
    return {
        f"{name} (first weight file)": min(until_first[1:]),
        f"{name} (all of it)": min(until_end[1:]),
    }


def run(words: list[Any], folder: Path) -> tuple[float, str]:
    """Seconds that a new Python takes, and what it said on its standard error."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
    )
    return time.perf_counter() - started, done.stderr


if __name__ == "__main__":
    main()
