"""What the steps cost that go from files to files, against `cp`, mergekit and PEFT: seconds and
peak memory.

    python -m benchmarks.streaming --sizes 0.1 1 --mergekit ENV/bin --record 1b
    python -m benchmarks.streaming --sizes 3 --repeats 1 --peers_up_to 3 --extract_up_to 1 --mergekit ENV/bin --record 3b
    python -m benchmarks.streaming --sizes 8 --repeats 2 --record 8b

Checkpoints are random Llamas in bfloat16, made in `--work` and removed afterwards. Every
measurement is a process of its own, the tools take turns, and the seconds include a final `sync`.
`apply` is the whole command, `apply, without start` its report's own seconds plus the sync: six
seconds of imports say nothing about a model. mergekit is to be installed in an environment of its
own (`--mergekit`, its `bin`); without one it is left out.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import records
from benchmarks.records import RESULTS
from safegene_trl import SafetyVector
from safegene_trl.checkpoints.checkpoint_folder import write_index
from safegene_trl.checkpoints.loading import load_tokenizer
from safegene_trl.checkpoints.row_blocks import RowReader
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.checkpoints.tensor_file import TensorFile, plan_files, stored_tensors
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import layer_index
from safegene_trl.models.parameters import canonical_modules, linear_shape
from safegene_trl.vectors.family import Family


ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # billions of parameters: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.1": (768, 2048, 10, 12, 4, 32000),
    "1": (2048, 5632, 22, 32, 4, 32000),
    "1.5": (1536, 8960, 28, 12, 2, 151936),
    "3": (3072, 8192, 28, 24, 8, 32000),
    "8": (4096, 14336, 32, 32, 8, 128256),
}
APPLY_RANK, EXTRACT_RANK = 8, 16
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
model.merge_and_unload().save_pretrained(out)
"""
EXTRACT = """
import json, sys, time
from pathlib import Path
from safegene_trl.extraction.delta import stored_delta
from safegene_trl.checkpoints.stored_model import StoredModel
from safetensors.torch import save_file
aligned, degraded, rank, out = sys.argv[1:]
started = time.perf_counter()
found = stored_delta(StoredModel.open(aligned), StoredModel.open(degraded), int(rank), show_progress=False)
tensors = {}
for name, truncation in found.items():
    tensors[f"base_model.model.{name}.lora_A.weight"] = truncation.delta.a
    tensors[f"base_model.model.{name}.lora_B.weight"] = truncation.delta.b
Path(out).mkdir()
save_file(tensors, Path(out, "adapter_model.safetensors"))
Path(out, "record.json").write_text(json.dumps({
    "seconds": time.perf_counter() - started,
    "kept": min(t.kept for t in found.values()),
    "optimum_at_most": max(t.optimum for t in found.values()),
}))
"""


def make_checkpoint(size: str, folder: Path) -> None:
    """A random checkpoint in files of at most 5 GB; one tensor at a time is in memory."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    write(
        folder,
        {n: p.shape for n, p in model.named_parameters()},
        lambda n, s: torch.empty(s).normal_(std=0.02, generator=generator),
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"<{i}>": i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), eos_token="<1>"
    )


def write(folder: Path, shapes: dict, value) -> None:
    folder.mkdir(parents=True)
    contents = {name: (torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}
    plan, index = plan_files(contents, "5GB")
    for file_name, names in plan.items():
        file = TensorFile(folder / file_name, {name: contents[name] for name in names})
        for name in names:
            file.write(name, value(name, contents[name][1]).to(torch.bfloat16))
        file.close()
    if index:
        write_index(index, folder)


def make_degraded(aligned: Path, folder: Path) -> None:
    """The same with an update of falling singular values on every linear layer of the stack."""
    stored, generator = StoredModel.open(str(aligned)), torch.Generator().manual_seed(1)
    falling = torch.logspace(0, -2, 64)
    with RowReader() as reader:

        def value(name: str, shape: tuple) -> torch.Tensor:
            if len(shape) < 2 or ".layers." not in name:
                return torch.full(shape, 0.02)
            left = torch.randn(shape[0], 64, generator=generator) * falling
            return stored.matrix(reader, name.removesuffix(".weight")) + 1e-3 * left @ torch.randn(
                64, shape[1], generator=generator
            )

        write(folder, {name: tensor.shape for name, tensor in stored.files.items()}, value)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(aligned / name, folder / name)


def make_vector(checkpoint: Path, folder: Path) -> None:
    stored, generator = StoredModel.open(str(checkpoint)), torch.Generator().manual_seed(2)
    deltas = {}
    for name, module in canonical_modules(stored.model).items():
        if (shape := linear_shape(module)) and layer_index(name) is not None:
            a, b = (
                torch.randn(*s, generator=generator) * 0.02
                for s in ((APPLY_RANK, shape[1]), (shape[0], APPLY_RANK))
            )
            deltas[name] = LowRankDelta(a.half(), b.half())
    SafetyVector(
        deltas=deltas,
        family=Family.of(stored.model, load_tokenizer(str(checkpoint))),
        aligned_model={"name": str(checkpoint), "revision": None, "files": {}},
        degraded_model={"name": "none", "revision": None, "files": {}},
        extraction={"method": "random", "rank": APPLY_RANK},
        selection={
            "method": "all",
            "scores": [],
            "selected_layers": sorted({layer_index(name) for name in deltas}),
        },
        prompts=[],
    ).save_pretrained(folder)


def measured(command: list, out: Path, timeout: int = 3600) -> dict:
    """Wall seconds with a final sync, and peak resident memory, of one process; its output is
    removed first.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=log, env=environment
        )
        peak = 0
        while process.poll() is None:
            # Not `ru_maxrss`, which begins with what this process had when it started the other.
            peak = peak_kib(process.pid) or peak
            if time.perf_counter() - started > timeout:
                process.kill()
                raise TimeoutError(f"{command[0]} took more than {timeout} s")
            time.sleep(0.02)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-3000:])
    before_sync = time.perf_counter()
    os.sync()
    ended = time.perf_counter()
    return {"seconds": ended - started, "sync": ended - before_sync, "peak_mib": peak / 1024}


def peak_kib(pid: int) -> int:
    """High-water mark of a process's resident memory, 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0
    )


def measure_apply(
    size: str, model: Path, vector: Path, work: Path, arguments: argparse.Namespace
) -> dict:
    out = work / "out"
    ours = [
        sys.executable,
        "-m",
        "safegene_trl",
        "apply",
        "--model_name_or_path",
        model,
        "--coefficients",
        "1",
    ]
    ours += ["--safegene.vector", vector, "--safegene.output.output_dir", out]
    tools = {"cp": ["cp", "-r", model, out], "apply": ours}
    if float(size) <= arguments.peers_up_to:
        tools["peft"] = [sys.executable, "-c", PEFT_MERGE, model, vector, out]
        if arguments.mergekit:
            recipe = {
                "merge_method": "passthrough",
                "dtype": "bfloat16",
                "models": [{"model": f"{model}+{vector}"}],
            }
            (work / "merge.yaml").write_text(yaml.safe_dump(recipe))
            tools["mergekit"] = [arguments.mergekit / "mergekit-yaml", work / "merge.yaml", out]
            tools["mergekit"] += ["--no-copy-tokenizer", "--lora-merge-cache", work / "cache"]
    runs: dict[str, list[dict]] = {name: [] for name in (*tools, "apply, without start")}
    for _ in range(arguments.repeats):
        for name, command in tools.items():
            shutil.rmtree(work / "cache", ignore_errors=True)
            result = measured(command, out)
            runs[name].append(result)
            print(size, name, result, flush=True)
            if name == "apply":
                phases = json.loads((out / "safegene_report.json").read_text())["phases"]
                seconds = sum(phase["seconds"] for phase in phases.values()) + result["sync"]
                runs["apply, without start"].append(
                    {"seconds": seconds, "peak_mib": result["peak_mib"]}
                )
    shutil.rmtree(out)
    table = {name: middle(results) for name, results in runs.items()}
    for name, row in table.items():
        row["times_cp"] = round(row["seconds"] / table["cp"]["seconds"], 2)
        if name in ("peft", "mergekit"):
            row["times_apply"] = round(row["seconds"] / table["apply"]["seconds"], 2)
            row["times_apply_without_start"] = round(
                row["seconds"] / table["apply, without start"]["seconds"], 2
            )
    return table


def middle(results: list[dict]) -> dict:
    return {
        "seconds": round(statistics.median(result["seconds"] for result in results), 2),
        "all_seconds": [round(result["seconds"], 2) for result in results],
        "peak_mib": round(max(result["peak_mib"] for result in results)),
    }


def measure_extract(size: str, model: Path, work: Path, arguments: argparse.Namespace) -> dict:
    degraded = work / "degraded"
    make_degraded(model, degraded)
    out = work / "lora"
    command = [sys.executable, "-c", EXTRACT, model, degraded, EXTRACT_RANK, out]
    results = [measured(command, out) for _ in range(arguments.repeats)]
    record = json.loads((out / "record.json").read_text())
    table = {"extract": middle(results) | {"error": reconstruction_error(model, degraded, out, 1)}}
    table["extract"] |= {
        "least_energy_kept": record["kept"],
        "largest_optimum_at_most": record["optimum_at_most"],
    }
    print(size, "extract", table["extract"], flush=True)
    if arguments.mergekit and float(size) <= arguments.peers_up_to:
        command = [
            arguments.mergekit / "mergekit-extract-lora",
            "--model",
            degraded,
            "--base-model",
            model,
        ]
        command += [
            "--out-path",
            out,
            "--max-rank",
            EXTRACT_RANK,
            "--exclude-regex",
            "lm_head|embed_tokens",
        ]
        result = measured(command, out)
        table["mergekit"] = middle([result]) | {
            "error": reconstruction_error(model, degraded, out, -1)
        }
        table["mergekit"]["times_extract"] = round(
            result["seconds"] / table["extract"]["seconds"], 2
        )
        print(size, "mergekit", table["mergekit"], flush=True)
    return table


def reconstruction_error(aligned: Path, degraded: Path, lora: Path, sign: int) -> float:
    """Mean relative Frobenius error of the extracted difference over the linear layers of three
    layers of the stack.
    """
    first, second = StoredModel.open(str(aligned)), StoredModel.open(str(degraded))
    factors = dict(_lora_tensors(lora))
    scale = 1.0
    if (lora / "adapter_config.json").is_file():
        config = json.loads((lora / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
    errors = []
    layers = {int(n.split(".layers.")[1].split(".")[0]) for n in factors if ".layers." in n}
    with RowReader() as reader:
        for module in first.weight_files:
            if layer_index(module) in (0, max(layers) // 2, max(layers)) and linear_shape(
                first.parameters[first.weight_files[module]].module
            ):
                difference = first.matrix(reader, module) - second.matrix(reader, module)
                a, b = (
                    factors[f"base_model.model.{module}.lora_{half}.weight"].float()
                    for half in "AB"
                )
                errors.append(float((difference - sign * scale * b @ a).norm() / difference.norm()))
    return round(statistics.mean(errors), 5)


def _lora_tensors(folder: Path):
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["0.1"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peers_up_to",
        type=float,
        default=1,
        help="Largest size that mergekit and PEFT are run on.",
    )
    parser.add_argument(
        "--extract_up_to",
        type=float,
        default=8,
        help="Largest size that extraction is measured on.",
    )
    parser.add_argument("--mergekit", type=Path, help="`bin` of an environment with mergekit.")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "streaming")
    parser.add_argument("--record", metavar="NAME", required=True, help="the record's name")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args()
    results: dict = {}
    for size in arguments.sizes:
        work = arguments.work / size
        shutil.rmtree(work, ignore_errors=True)
        try:
            make_checkpoint(size, work / "model")
            make_vector(work / "model", work / "vector")
            gc.collect()
            files = stored_tensors(work / "model").values()
            results[size] = {"bytes": sum(tensor.num_bytes for tensor in files)}
            results[size]["apply"] = measure_apply(
                size, work / "model", work / "vector", work, arguments
            )
            if float(size) <= arguments.extract_up_to:
                results[size]["extract"] = measure_extract(size, work / "model", work, arguments)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        record = {
            "sizes": results,
            "apply_rank": APPLY_RANK,
            "extract_rank": EXTRACT_RANK,
            "aims": {size: aims(result) for size, result in results.items()},
            "machine": machine(arguments),
        }
        records.write("streaming", arguments.record, record, arguments.results)


def aims(result: dict) -> list[dict]:
    """Each aim with what was reached; of a missed one, why."""
    found = result["apply"]
    whole, work = found["apply"], found["apply, without start"]
    start = f"{whole['seconds'] - work['seconds']:.1f} of {whole['seconds']:.1f} s are Python's start and imports (torch, transformers, PEFT, TRL)"
    rows = [
        {"what": "apply ÷ cp, without start", "at_most": 3, "reached": work["times_cp"]},
        {
            "what": "apply ÷ cp, whole command",
            "at_most": 3,
            "reached": whole["times_cp"],
            "why": start,
        },
        {"what": "peak MiB of apply", "at_most": 1024, "reached": whole["peak_mib"]},
    ]
    for peer in ("peft", "mergekit"):
        if peer in found:
            disk = "; all of them wait for the disk" if whole["seconds"] > 15 else ""
            rows += [
                {
                    "what": f"{peer} ÷ apply",
                    "at_least": 4,
                    "reached": found[peer]["times_apply"],
                    "why": start + disk,
                },
                {
                    "what": f"{peer} ÷ apply, without start (the peer's start is in its seconds)",
                    "at_least": 4,
                    "reached": found[peer]["times_apply_without_start"],
                    "why": "all of them wait for the disk",
                },
            ]
    peer = result.get("extract", {}).get("mergekit")
    if peer is not None:
        why = "a small model: the start is most of extract's seconds"
        rows.append(
            {
                "what": "mergekit-extract-lora ÷ extract",
                "at_least": 20,
                "reached": peer["times_extract"],
                "why": why,
            }
        )
    for row in rows:
        row["met"] = (
            row["reached"] <= row["at_most"]
            if "at_most" in row
            else row["reached"] >= row["at_least"]
        )
        if row["met"]:
            row.pop("why", None)
    return rows


def machine(arguments: argparse.Namespace) -> dict:
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    if arguments.mergekit:
        listed = subprocess.run(
            [
                arguments.mergekit / "python",
                "-c",
                "import importlib.metadata as m; print(m.version('mergekit'))",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        versions["mergekit"] = listed.stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **versions,
    }


if __name__ == "__main__":
    main()
