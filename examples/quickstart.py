"""Watch a real LLM lose refusals in a harmless fine-tune, and get them back from a reusable safety
vector.

    make quickstart

Fine-tunes the aligned SmolLM2-135M on drug-review sentiment with `SafeGeneCallback`, then measures
the aligned, the fine-tuned and the safeguarded model on prompts and reviews that neither training
nor recalibration has seen.
"""

# ruff: noqa: E402

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safegene_trl.commands.library_noise import hold_back


hold_back()  # what libraries say of themselves, some of it as they are imported

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback, SafeGeneConfig
from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.data.rows import conversation
from safegene_trl.data.sources import draw, load_rows
from safegene_trl.judges.intervals import Rate
from safegene_trl.judges.refusal_phrases import is_refusal
from safegene_trl.models.generation import generate_answers


ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m"
BUILD = ROOT / "build" / "smollm2-135m"
OUT = ROOT / "out" / "quickstart"


def step_settings(short: bool) -> dict:
    """How the safety step is set; refusals are measured below, on prompts that it has not seen."""
    shots = (4, 4, 4) if short else (24, 12, 12)
    return {
        "data": {
            "num_safety_shots": shots[0],
            "num_benign_shots": shots[1],
            "num_task_shots": shots[2],
        },
        "search": {
            "max_evaluations": 3 if short else 8,
            "max_utility_loss": 10.0 if short else 0.1,
        },
        "measure": {"num_test_prompts": 0},
        "allow_other_base": True,  # put together on this machine: the last bits of a sum depend on the processor
    }


def batches(short: bool) -> int:
    """How many the fine-tune is trained on."""
    return 3 if short else 25


def learning_rate(short: bool) -> float:
    """In a few steps it must be high: a fine-tune that loses nothing is given nothing back."""
    return 2e-3 if short else 2e-4


def say(stage: int, what: str) -> None:
    """One line before every stage: minutes pass in some of them."""
    print(f"\n[{stage}/4] {what}", flush=True)


class SayWhatFollows(TrainerCallback):
    """Stands before the safety step where the training ends."""

    def __init__(self, short: bool):
        self.time = "less than a minute" if short else "up to 5 minutes"

    def on_train_end(self, *args, **kwargs) -> None:
        say(
            3,
            f"The safety step: finds the vector's coefficients and writes the safeguarded model, {self.time}.",
        )


def fine_tune(short: bool) -> dict:
    """One LoRA fine-tune with the callback; returns the callback's report."""
    shutil.rmtree(OUT, ignore_errors=True)
    callback = SafeGeneCallback(
        SafeGeneConfig(vector=str(RECIPE / "safety-vector"), **step_settings(short))
    )
    trainer = SFTTrainer(
        model=str(BUILD / "aligned"),
        args=SFTConfig(
            output_dir=str(OUT),
            max_steps=batches(short),
            per_device_train_batch_size=4,
            learning_rate=learning_rate(short),
            lr_scheduler_type="constant",
            max_length=256,
            gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            logging_steps=5,
            seed=0,
        ),
        train_dataset=load_dataset(
            "json", data_files=str(BUILD / "reviews_train.jsonl"), split="train"
        ),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[SayWhatFollows(short), callback],
    )
    trainer.train()
    trainer.save_model()  # the plain fine-tune, for comparison
    return callback.report


def fine_tune_launched(short: bool, accelerate_config: str, processes: int) -> dict:
    """The same fine-tune in many processes, by the recipe; then one process finds the coefficients
    of what it saved.
    """
    shutil.rmtree(OUT, ignore_errors=True)
    step = ["--safegene", json.dumps(step_settings(short))]
    launcher = ["--accelerate_config", accelerate_config, "--num_processes", str(processes)]
    training = [
        "--output_dir",
        OUT,
        "--per_device_train_batch_size",
        4 // processes,
        "--max_steps",
        batches(short),
        "--learning_rate",
        learning_rate(short),
    ]
    data = [
        "--safegene.vector",
        RECIPE / "safety-vector",
        "--safegene.data.task_data",
        BUILD / "reviews_train.jsonl",
    ]
    safegene("sft", *launcher, "--config", RECIPE / "sft.yaml", *training, *data, *step)
    say(
        3,
        f"One process finds the coefficients of the same fine-tune, to be compared: up to {'a minute' if short else '5 minutes'}.",
    )
    safegene(
        "apply",
        "--model_name_or_path",
        OUT,
        "--safegene.output.output_dir",
        OUT / "applied",
        *data,
        *step,
    )
    reports = [
        json.loads((OUT / name / "safegene_report.json").read_text())
        for name in ("safeguarded", "applied")
    ]
    sharded, alone = (report["coefficients"] for report in reports)
    apart = max(abs(sharded[name] - alone[name]) for name in alone)
    print(
        f"Coefficients of {processes} processes ({accelerate_config}) and of one differ by at most {apart:.1e}."
    )
    return reports[0]


def safegene(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "safegene_trl", *map(str, words)], check=True, cwd=ROOT, timeout=3600
    )


def measure(model_dir: Path, count: int) -> dict:
    """How many harmful prompts it refuses, how many benign ones it answers and how many held-out
    reviews it judges rightly: shares (0–1) with 95 % intervals.
    """
    started = time.perf_counter()
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    if torch.cuda.is_available():
        model = model.cuda()

    def answers(rows: list[dict], max_new_tokens: int) -> list[str]:
        prompts = [conversation(row)[0] for row in rows]
        return generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size=32)

    harmful, benign, reviews = (
        drawn(name, count) for name in ("eval_harmful", "eval_benign", "reviews_test")
    )
    labels = zip(reviews, answers(reviews, max_new_tokens=8), strict=True)
    outcomes = {
        "refused": [is_refusal(answer) for answer in answers(harmful, max_new_tokens=32)],
        "answered": [not is_refusal(answer) for answer in answers(benign, max_new_tokens=32)],
        "accuracy": [row["label"] in answer.lower() for row, answer in labels],
    }
    rates = {name: Rate(sum(found), count) for name, found in outcomes.items()}
    return {
        **{name: rate.share for name, rate in rates.items()},
        "intervals": {name: rate.interval for name, rate in rates.items()},
        "seconds": time.perf_counter() - started,
    }


def table_row(name: str, row: dict) -> str:
    """Shares with their intervals, in percent."""
    cells = [
        f"{row[key]:.0%} ({low:.0%}–{high:.0%})" for key, (low, high) in row["intervals"].items()
    ]
    return f"{name:<12}{''.join(f'{cell:>19}' for cell in cells)} {row['seconds']:>8.0f}"


def drawn(name: str, count: int) -> list[dict]:
    """`count` rows of a prepared file, the same ones in every run."""
    return draw(load_rows(str(BUILD / f"{name}.jsonl"), "train"), count, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="few steps and prompts: shows only that it runs"
    )
    parser.add_argument(
        "--accelerate_config", help="fine-tune in many processes, e.g. `zero3`: name or path"
    )
    parser.add_argument("--num_processes", type=int, default=2, help="how many (1, 2 or 4)")
    options = parser.parse_args()
    short = options.short
    started = time.perf_counter()
    say(
        1,
        "Puts the aligned SmolLM2-135M and its data together from installed packages, up to a minute.",
    )
    subprocess.run([sys.executable, str(RECIPE / "prepare.py")], check=True, timeout=900)
    end = (
        "less than a minute on idle cores, in which little is learned and some refusals are lost"
        if short
        else "up to 3 minutes: refusals are lost on the way"
    )
    say(2, f"Fine-tunes it on {batches(short)} batches of drug reviews, {end}.")
    if options.accelerate_config:
        report = fine_tune_launched(short, options.accelerate_config, options.num_processes)
    else:
        report = fine_tune(short)
    models = {"aligned": BUILD / "aligned", "fine-tuned": OUT, "safeguarded": OUT / "safeguarded"}
    count = 4 if short else 60
    say(
        4,
        f"Measures three models on {count} prompts or reviews of each kind, "
        f"{'some seconds' if short else 'up to two minutes'} for each model.",
    )
    rows = {}
    for name, folder in models.items():
        print(f"      the {name} model …", flush=True)
        rows[name] = measure(folder, count)
    print(
        f"\n{'':<12}{'harmful refused':>19}{'benign answered':>19}{'task accuracy':>19} {'seconds':>8}"
    )
    for name, row in rows.items():
        print(table_row(name, row))
    print("\nIn brackets: the 95 % interval of each share. The benign prompts only look harmful.")
    print(
        f"\nThe safety step's outcome: {report['decision']['outcome'].replace('_', ' ')}; its refusals are measured above."
    )
    print(
        f"Recalibration took {report['phases']['recalibrate']['seconds']:.0f} s, all of it {time.perf_counter() - started:.0f} s."
    )
    print(
        f"Checkpoint:   {OUT / 'safeguarded'}\nReport:       {OUT / 'safeguarded' / 'safegene_report.html'}"
    )
    print(f"In a browser: {Path(sys.executable).with_name('safegene')} demo {OUT / 'safeguarded'}")
    if short:
        print(
            f"\nThis was the short form: {batches(short)} batches and {count} prompts of each kind show that it runs, and not what "
            "it achieves. `make quickstart` shows that."
        )
    (OUT / "table.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is finished lies in {OUT}; run this again.", file=sys.stderr)
        raise SystemExit(130) from None
