"""Fine-tune one model again and again on new data, and release only what keeps its refusals.

    python examples/pipeline.py --model ALIGNED --vector VECTOR --data night1.jsonl night2.jsonl night3.jsonl --line releases

Every fine-tune starts from the last release that was not rejected, so the vector's coefficients are
carried on and never added twice. A rejected fine-tune leaves no checkpoint, and the next one starts
where it had started. One that failed ends the run. Run it again, with more data or without, and it
goes on where it was: `fine_tunes.json` says which file each fine-tune is of, and `history.jsonl`
what came of it. A file is known by its content.
"""

import argparse
import hashlib
import json
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safegene_trl import OutputConfig, SafeGeneCallback, SafeGeneConfig
from safegene_trl.checkpoints.atomic_writes import replace_file
from safegene_trl.commands.history import describe
from safegene_trl.config.gate import GateConfig
from safegene_trl.errors import SafeGeneError
from safegene_trl.step.drift import drift_warnings
from safegene_trl.step.history import last_accepted, read_history


def release(number: int, data: Path, learning_rate: float, options: argparse.Namespace) -> None:
    """One fine-tune with the safety step at its end; what comes of it is in the history."""
    line = Path(options.line)
    last = last_accepted(read_history(line / "history.jsonl"))
    start = options.model if last is None else last["output"]
    settings = json.loads(options.settings)
    place = {"output_dir": str(line / f"release-{number}"), "history": str(line / "history.jsonl")}
    config = SafeGeneConfig(
        vector=options.vector,
        output=OutputConfig(**place, **settings.pop("output", {})),
        gate=GateConfig(**json.loads(options.gate)),
        allow_other_base=options.allow_other_base,
        **settings,
    )
    trainer = SFTTrainer(
        model=str(start),
        args=SFTConfig(
            output_dir=str(line / f"fine-tune-{number}"),
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_length=256,
            save_strategy="no",
            report_to="none",
            use_cpu=options.use_cpu,
            bf16=not options.use_cpu,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32" if options.use_cpu else "bfloat16"},
            seed=number,
        ),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[SafeGeneCallback(config)],
    )
    try:
        trainer.train()
    except SafeGeneError as error:  # rejected, or e.g. a diverged training
        print(f"release {number}: {error}")


def known_files(line: Path) -> list[dict[str, str]]:
    """The file of each fine-tune that was begun, the first one's first: its name and SHA-256."""
    record = line / "fine_tunes.json"
    return json.loads(record.read_text()) if record.exists() else []


def number_of(data: Path, line: Path) -> int:
    """The number of a file's fine-tune; a new one is written down before anything is trained."""
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    files = known_files(line)
    digests = [known["sha256"] for known in files]
    if digest in digests:
        return digests.index(digest) + 1
    files.append({"data": str(data), "sha256": digest})
    replace_file(line / "fine_tunes.json", json.dumps(files, indent=2))
    return len(files)


def outcomes(line: Path) -> dict[str, str]:
    """What came of each fine-tune, by the name of its release; a failed one has none."""
    history = read_history(line / "history.jsonl")
    return {Path(each["output"]).name: each["outcome"] for each in history}


def arguments() -> argparse.Namespace:
    """What was asked for; whatever cannot be done ends the script here, before any fine-tune."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="aligned model: directory or hub id")
    parser.add_argument("--vector", required=True, help="its family's safety vector")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        help="one JSONL file per fine-tune, in TRL's formats",
    )
    parser.add_argument("--line", default="releases", help="folder of the model line")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[2e-4],
        help="one for all, or one per file",
    )
    parser.add_argument("--max_steps", type=int, default=25)
    parser.add_argument(
        "--gate",
        default='{"min_refusal_rate": 0.8, "max_incoherent": 0.1}',
        help="keys of GateConfig, as JSON",
    )
    parser.add_argument("--settings", default="{}", help="further keys of SafeGeneConfig, as JSON")
    parser.add_argument(
        "--allow_other_base", action="store_true", help="the model was put together on this machine"
    )
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args()
    files, rates = len(options.data), len(options.learning_rates)
    if rates not in (1, files):
        parser.error(
            f"--data names {files} files and --learning_rates {rates} rates: give one rate for all, or one for each file."
        )
    if absent := [str(data) for data in options.data if not data.is_file()]:
        parser.error(f"--data names files that are not there: {', '.join(absent)}.")
    line = Path(options.line)
    known = {f"release-{number}" for number in range(1, len(known_files(line)) + 1)}
    if outcomes(line).keys() - known:
        parser.error(
            f"{line} has releases whose files `fine_tunes.json` does not name: give another --line."
        )
    return options


def main() -> int:
    options = arguments()
    line = Path(options.line)
    rates = options.learning_rates * (len(options.data) if len(options.learning_rates) == 1 else 1)
    ended: dict[int, str] = {}  # what came of each release
    for data, rate in zip(options.data, rates, strict=True):
        number = number_of(data, line)
        if (before := outcomes(line).get(f"release-{number}")) is not None:
            print(f"release {number}: {before} in an earlier run, of the same data as {data}")
            ended[number] = before
            continue
        release(number, data, rate, options)
        ended[number] = outcomes(line).get(f"release-{number}", "failed")
        print(f"release {number}: {ended[number]}")
        if ended[number] == "failed":  # the next one is to start from what comes of it
            print(f"Nothing came of {data}: run this again, or leave it out.")
            break
    releases = read_history(line / "history.jsonl")
    print(describe(releases))
    for warning in drift_warnings(releases):
        print(f"warning: {warning}")
    return {"rejected": 4, "failed": 2}.get(ended[max(ended)], 0)


if __name__ == "__main__":
    raise SystemExit(main())
