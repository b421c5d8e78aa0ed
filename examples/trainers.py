"""The callback with four trainers: `Trainer`, `SFTTrainer` with LoRA, `DPOTrainer`, `GRPOTrainer`.

    python examples/trainers.py sft --model ALIGNED --vector VECTOR --data data.jsonl --output out
    accelerate launch --config_file safegene_trl/accelerate_configs/zero3.yaml --num_processes 8 examples/trainers.py sft …

`data.jsonl` holds `prompt` and `completion` (conversational or not); for `dpo` also `chosen` and
`rejected`; `grpo` reads `prompt` alone and measures utility on the completions.
"""

import argparse
import json

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback, SafeGeneConfig


def plain(model: str, data: Dataset, arguments: dict) -> Trainer:
    """`transformers.Trainer` on all weights; the callback needs the tokenizer, as
    `processing_class`.
    """
    # before the model, which is sharded while it is loaded under ZeRO-3
    settings = TrainingArguments(**arguments)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)

    def tokenized(row: dict) -> dict:
        if isinstance(row["prompt"], str):  # plain text, without a chat template
            prompt = tokenizer(row["prompt"])["input_ids"]
            said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = [*prompt, *said, tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}
        messages = [*row["prompt"], *row["completion"]]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)[
            "input_ids"
        ]
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    return Trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32", trust_remote_code=False),
        settings,
        train_dataset=data.map(tokenized, remove_columns=data.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def sft(model: str, data: Dataset, arguments: dict) -> Trainer:
    return SFTTrainer(model, SFTConfig(**arguments), train_dataset=data, peft_config=lora())


def dpo(model: str, data: Dataset, arguments: dict) -> Trainer:
    """Utility is measured on the chosen answers."""
    columns = [name for name in data.column_names if name not in ("prompt", "chosen", "rejected")]
    return DPOTrainer(
        model,
        args=DPOConfig(**arguments),
        train_dataset=data.remove_columns(columns),
        peft_config=lora(),
    )


def grpo(model: str, data: Dataset, arguments: dict) -> Trainer:
    """Its data has prompts only: `task_data` names data with answers, to measure utility on."""

    def short(completions: list, **columns: object) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [-abs(20 - len(text)) / 20 for text in texts]

    settings = GRPOConfig(**arguments, num_generations=2, max_completion_length=8)
    return GRPOTrainer(
        model, short, args=settings, train_dataset=data.select_columns("prompt"), peft_config=lora()
    )


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


TRAINERS = {"plain": plain, "sft": sft, "dpo": dpo, "grpo": grpo}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vector", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="out")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--settings", default="{}", help="further keys of SafeGeneConfig, as JSON")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args()
    arguments = {
        "output_dir": options.output,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": 2,
    }
    arguments |= {
        "use_cpu": options.use_cpu,
        "bf16": not options.use_cpu,
        "report_to": "none",
        "save_strategy": "no",
    }
    data = load_dataset("json", data_files=options.data, split="train")
    trainer = TRAINERS[options.trainer](options.model, data, arguments)
    settings = json.loads(options.settings)
    if options.trainer == "grpo":
        settings["data"] = {"task_data": options.data} | settings.get("data", {})
    SafeGeneCallback(SafeGeneConfig(vector=options.vector, **settings)).attach(trainer)
    trainer.train()
    trainer.save_model()  # the plain fine-tune; the safeguarded checkpoint is in `safeguarded` beside it


if __name__ == "__main__":
    main()
