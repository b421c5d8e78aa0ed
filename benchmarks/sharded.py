"""What recalibration and merge cost where the training ran: seconds, memory of each rank and bytes
moved.

    python -m benchmarks.sharded --record cpu
    python -m benchmarks.sharded --runs zero3:2 --checkpointing --record cpu_checkpointing
    python -m benchmarks.sharded --size 1b --runs zero3:1 zero3_offload:1 --record gpu

Every run is a launch of its own: a full fine-tune of a random Llama on random tokens, with the
callback. Peak memory is the accelerator's, or on a CPU the process's resident memory (VmHWM); the
training's is that of its steps, from the first on.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # hidden, intermediate, layers, heads, vocabulary, tokens of a training sequence, samples per step and rank
    "tiny": (128, 256, 2, 4, 1000, 64, 2),
    "30m": (512, 1376, 8, 8, 8192, 256, 4),
    "1b": (2048, 5632, 22, 16, 32000, 1024, 8),
    "3b": (3072, 8192, 28, 24, 32000, 1024, 4),
}
RUNS = ["plain:1", "ddp:2", "zero3:2", "zero3_offload:2"]
SHOTS = {"num_safety_shots": 16, "num_benign_shots": 16, "num_task_shots": 16}
# Freed tensors go back to the system at once, so that resident memory is what is in use.
STRICT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
ON_GPU = torch.cuda.is_available()


def peak_mib() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        / 2**10
    )


def reset_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def bytes_moved() -> int:
    """What DeepSpeed's collectives of this rank have carried so far, by its own log."""
    from deepspeed.comm import comm

    log = comm.comms_logger.comms_dict if comm.comms_logger else {}
    return sum(int(size) * counts[0] for sizes in log.values() for size, counts in sizes.items())


def deepspeed_config(backend: str) -> dict:
    zero: dict = {"stage": int(backend[4]), "stage3_gather_16bit_weights_on_model_save": True}
    if backend.endswith("offload"):
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
    }


def worker(backend: str, size: str, folder: Path, steps: int, checkpointing: bool) -> None:
    """One rank of one run; writes its figures to `<folder>/<rank>.json`."""
    from datasets import Dataset
    from transformers import (
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from safegene_trl import (
        DataConfig,
        MeasureConfig,
        SafeGeneCallback,
        SafeGeneConfig,
        SearchConfig,
    )
    from safegene_trl.distributed.processes import join_processes, leave_processes
    from safegene_trl.recalibration import search as recalibration
    from safegene_trl.reporting.clock import PhaseClock

    join_processes()
    recalibration.objection = lambda before, after, budget: ""  # random weights: nothing to improve
    length, batch = SIZES[size][5:]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        5, SIZES[size][4], (steps * batch * 8, length), generator=generator
    ).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    figures: dict = {"training_seconds": 0.0, "phases": {}}

    class Watch(TrainerCallback):
        """Of the training: its seconds, peak and traffic."""

        def on_train_begin(self, *args, **kwargs):
            reset_peak()
            self.started, self.moved = time.perf_counter(), bytes_moved()

        def on_train_end(self, *args, **kwargs):
            figures["training_seconds"] = time.perf_counter() - self.started
            figures["training_bytes_moved"] = bytes_moved() - self.moved
            figures["training_peak_mib"] = peak_mib()

    @contextmanager
    def phase(clock, name):
        reset_peak()
        started, moved = time.perf_counter(), bytes_moved()
        yield
        figures["phases"][name] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_mib": round(peak_mib(), 1),
            "bytes_moved": bytes_moved() - moved,
        }
        clock.phases[name] = {"seconds": 0.0, "peak_memory_mib": 0.0}

    PhaseClock.phase = phase
    arguments = {"deepspeed": deepspeed_config(backend)} if backend.startswith("zero") else {}
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_checkpointing=checkpointing,
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    config = SafeGeneConfig(
        vector=str(folder / "vector"),
        data=DataConfig(**SHOTS),
        search=SearchConfig(max_evaluations=3),
        measure=MeasureConfig(num_test_prompts=0),
    )
    trainer = Trainer(
        model=LlamaForCausalLM.from_pretrained(
            folder / "model", dtype=torch.bfloat16 if ON_GPU else torch.float32
        ),
        args=args,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        callbacks=[Watch(), SafeGeneCallback(config)],
    )
    started = time.perf_counter()
    trainer.train()
    figures["whole_seconds"] = time.perf_counter() - started
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(figures))
    leave_processes()


def prepare(folder: Path, size: str) -> int:
    """Writes a random model, its tokenizer and a vector of rank 16 for all layers; returns the
    number of parameters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from safegene_trl.models.low_rank import LowRankDelta
    from safegene_trl.vectors.family import Family
    from safegene_trl.vectors.safety_vector import SafetyVector

    hidden, intermediate, layers, heads, vocabulary, *_ = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=vocabulary,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if ON_GPU else torch.float32)
    words = {f"w{i}": i for i in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="w1", pad_token="w0", unk_token="w2"
    )
    deltas = {
        name: LowRankDelta(
            torch.randn(16, module.in_features) * 0.02, torch.randn(module.out_features, 16) * 0.02
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    texts = [
        (" ".join(f"w{(i * 37 + k * 11) % vocabulary}" for k in range(60)), i % 2)
        for i in range(64)
    ]
    prompts = [
        {"prompt": text, "response": "w7 w8 w9 w10 w11 w12", "kind": "benign" if odd else "harmful"}
        for text, odd in texts
    ]
    record = {"name": "random", "revision": None, "files": {}}
    vector = SafetyVector(
        deltas,
        Family.of(model, tokenizer),
        record,
        record,
        {"method": "random"},
        {"method": "all"},
        prompts,
    )
    vector.save_pretrained(folder / "vector")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return sum(parameter.numel() for parameter in model.parameters())


def launch(run: str, folder: Path, options: argparse.Namespace, strict_malloc: bool) -> list[dict]:
    """One launch; the figures of its ranks."""
    backend, processes = run.split(":")
    words = [
        "--worker",
        backend,
        "--size",
        options.size,
        "--folder",
        str(folder),
        "--steps",
        str(options.steps),
    ]
    words += ["--checkpointing"] if options.checkpointing else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    if not ON_GPU:
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, 2 // int(processes))),
        }
        environment |= STRICT_MALLOC if strict_malloc else {}
    launcher = (
        ["-m", "torch.distributed.run", "--nproc_per_node", processes] if backend != "plain" else []
    )
    subprocess.run(
        [sys.executable, *launcher, __file__, *words], check=True, env=environment, timeout=3000
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(int(processes))]


def measure(run: str, folder: Path, options: argparse.Namespace) -> dict:
    """On a CPU two launches, one for the seconds and one, with a slow but strict allocator, for the
    memory.
    """
    timed = launch(run, folder, options, strict_malloc=False)
    ranks = timed if ON_GPU else launch(run, folder, options, strict_malloc=True)
    first = timed[0]
    backend, processes = run.split(":")
    steps = sum(first["phases"][name]["seconds"] for name in ("recalibrate", "save"))
    return {
        "backend": backend,
        "processes": int(processes),
        "training_seconds_per_step": first["training_seconds"] / options.steps,
        "recalibrate_seconds": first["phases"]["recalibrate"]["seconds"],
        "merge_seconds": first["phases"]["save"]["seconds"],
        "training_steps_that_take_as_long": steps / (first["training_seconds"] / options.steps),
        "share_of_a_fine_tune_of_1000_steps": steps
        / (steps + 1000 * first["training_seconds"] / options.steps),
        "recalibration_peak_over_training_peak": [
            rank["phases"]["recalibrate"]["peak_mib"] / rank["training_peak_mib"] for rank in ranks
        ],
        "merge_peak_over_training_peak": [
            rank["phases"]["save"]["peak_mib"] / rank["training_peak_mib"] for rank in ranks
        ],
        "ranks_timed": timed,
        "ranks_memory": ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument(
        "--runs", nargs="+", default=RUNS, help="BACKEND:PROCESSES, each a launch of its own"
    )
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument(
        "--checkpointing", action="store_true", help="train with gradient checkpointing"
    )
    parser.add_argument(
        "--record", metavar="NAME", help="the record's name; default: the figures are only printed"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of the records (default: benchmarks/results)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.size, options.folder, options.steps, options.checkpointing)
        return
    from benchmarks import records
    from safegene_trl.provenance import software_versions

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = prepare(folder, options.size)
        vector_mib = (folder / "vector" / "adapter_model.safetensors").stat().st_size / 2**20
        runs = [measure(run, folder, options) for run in options.runs]
    result = {
        "parameters": parameters,
        "vector_mib": vector_mib,
        "steps": options.steps,
        "gradient_checkpointing": options.checkpointing,
        "sequence_and_batch": SIZES[options.size][5:],
        "runs": runs,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        },
        "software": software_versions(),
    }
    for run in runs:
        print(json.dumps({key: value for key, value in run.items() if not key.startswith("ranks")}))
    if options.record:
        records.write("sharded", options.record, result, options.results or records.RESULTS)


if __name__ == "__main__":
    main()
