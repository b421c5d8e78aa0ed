"""Fine-tune one model again and again on new data, and release only what keeps its refusals.

    python examples/pipeline.py --model ALIGNED --vector VECTOR --data night1.jsonl night2.jsonl night3.jsonl --line releases

Every fine-tune starts from the last release that was not rejected, so the vector's coefficients are
carried on and never added twice. A rejected fine-tune leaves no checkpoint, and the next one starts
where it had started. Run it again with more data and it goes on where it was: what has been
released is in `history.jsonl`.
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safegene_trl import OutputConfig, SafeGeneCallback, SafeGeneConfig
from safegene_trl.commands.history import describe
from safegene_trl.config.gate import GateConfig
from safegene_trl.errors import SafeGeneError
from safegene_trl.step.drift import drift_warnings
from safegene_trl.step.history import last_accepted, read_history


def release(number: int, data: Path, learning_rate: float, options: argparse.Namespace) -> str:
    """One fine-tune with the safety step at its end; returns the outcome."""
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
    callback = SafeGeneCallback(config)
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
        callbacks=[callback],
    )
    try:
        trainer.train()
    except (
        SafeGeneError
    ) as error:  # rejected, or e.g. a diverged training; before the training there is no report
        print(f"release {number}: {error}")
        if callback.report is None:
            raise
    return callback.report.get("decision", {}).get("outcome", "failed")


def main() -> int:
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
    history = Path(options.line) / "history.jsonl"
    rates = options.learning_rates * (len(options.data) if len(options.learning_rates) == 1 else 1)
    done = len(read_history(history))
    outcome = ""
    for number, (data, rate) in enumerate(zip(options.data, rates, strict=True), start=1):
        if number > done:
            outcome = release(number, data, rate, options)
            print(f"release {number}: {outcome}")
    releases = read_history(history)
    print(describe(releases))
    for warning in drift_warnings(releases):
        print(f"warning: {warning}")
    return {"rejected": 4, "failed": 2}.get(outcome, 0)


if __name__ == "__main__":
    raise SystemExit(main())
