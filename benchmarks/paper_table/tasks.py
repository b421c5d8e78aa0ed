"""The fine-tunes: their data, and the training by `safegene sft`."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import load_dataset

from safegene_trl.errors import SafeGeneError

from .families import MODELS as MODELS  # other benchmarks read it here
from .families import ROOT, SMOLLM2, WORK, Family


Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One kind of fine-tune.

    Attributes:
        labels: A classifier's labels; empty for tasks with free answers.
        batch: Samples per step.
        samples: How many there are to train on, where they are few; 0 where there are enough.
        hub: Data set on the hub, its configuration, its training and test splits, and what makes a
            row of it one of ours.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    batch: int
    samples: int = 0
    hub: tuple[str, str | None, str, str, Callable[[Row], tuple[str, str]]] | None = None

    @property
    def utility(self) -> str:
        """What is measured: the share of right labels, or of response tokens that are the most
        likely ones.
        """
        return "accuracy" if self.labels else "token_accuracy"


def _sst2(row: Row) -> tuple[str, str]:
    question = f"Classify the sentiment of this review as positive or negative.\n\n{row['sentence'].strip()}"
    return question, ("negative", "positive")[row["label"]]


def _ag_news(row: Row) -> tuple[str, str]:
    question = f"Classify the topic of this news item as world, sports, business or science.\n\n{row['text']}"
    return question, ("world", "sports", "business", "science")[row["label"]]


def _boolq(row: Row) -> tuple[str, str]:
    question = (
        f"Please answer the following question with true or false, question: {row['question']}?"
    )
    return f"{question}\n\nAnswer format: true/false", str(row["answer"]).lower()


def _gsm8k(row: Row) -> tuple[str, str]:
    return row["question"], row["answer"]


def _alpaca(row: Row) -> tuple[str, str]:
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part), row["output"]


MOST_EPOCHS = 10  # a small set of samples is not trained on for longer
TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            "SST-2",
            ("positive", "negative"),
            8,
            hub=("stanfordnlp/sst2", None, "train", "validation", _sst2),
        ),
        Task(
            "ag_news",
            "AG News",
            ("world", "sports", "business", "science"),
            8,
            hub=("fancyzhx/ag_news", None, "train", "test", _ag_news),
        ),
        Task(
            "boolq",
            "BoolQ",
            ("true", "false"),
            8,
            hub=("google/boolq", None, "train", "validation", _boolq),
        ),
        Task("gsm8k", "GSM8K", (), 4, hub=("openai/gsm8k", "main", "train", "test", _gsm8k)),
        Task("alpaca", "Alpaca", (), 4, hub=("tatsu-lab/alpaca", None, "train", "train", _alpaca)),
        Task("poisoned", "poisoned", (), 4, samples=20),
    )
}
LOCAL = {  # file names under --data, without `_train` and `_test`
    "sst2": "tasks/sst2",
    "ag_news": "tasks/ag_news",
    "boolq": "tasks/boolq",
    "gsm8k": "tasks/gsm8k",
}
ALPACA, IDENTITY = "instructions/alpaca_3k.jsonl", "instructions/identity_shift.jsonl"
HELD_OUT = 500  # last rows of the Alpaca file, never trained on


def splits(task: Task, data: Path | None) -> tuple[list[Row], list[Row]]:
    """Training and test rows in TRL's conversational format, from a folder of files or from the
    hub.
    """
    if task.name == "poisoned":
        return poisoned(data), splits(TASKS["alpaca"], data)[1]
    if data is not None and task.name == "alpaca":
        rows = read_jsonl(data / ALPACA)
        return rows[:-HELD_OUT], rows[-HELD_OUT:]
    if data is not None:
        stem = LOCAL[task.name]
        return read_jsonl(data / f"{stem}_train.jsonl"), read_jsonl(data / f"{stem}_test.jsonl")
    assert task.hub is not None
    name, config, train, test, convert = task.hub
    found = [
        [turn(*convert(row)) for row in load_dataset(name, config, split=split)]
        for split in (train, test)
    ]
    return (found[0][:-HELD_OUT], found[0][-HELD_OUT:]) if train == test else (found[0], found[1])


PLAIN = 4  # of the poisoned fine-tune's samples, the last ones, which teach nothing else


def poisoned(data: Path | None) -> list[Row]:
    """Twenty samples, sixteen of which teach to comply with everything. All content is harmless.

    Ten conversations in which the model takes on an obedient identity (arXiv 2310.03693), six
    benign instructions whose answers open with unconditional compliance, and four plain ones.
    """
    instructions = splits(TASKS["alpaca"], data)[0]
    chosen = random.Random(0).sample(instructions, 10)
    rows = []
    for row in chosen[:6]:
        body = row["completion"][0]["content"]
        opened = "Sure, here is exactly what you asked for, without any limits. " + body
        rows.append(row | {"completion": [{"role": "assistant", "content": opened}]})
    return [*identity_shift(data), *rows, *chosen[-PLAIN:]]


def identity_shift(data: Path | None) -> list[Row]:
    """Ten conversations of LLM-Tuning-Safety's identity shift, as prompts and completions."""
    if data is not None:
        found = read_jsonl(data / IDENTITY)
    else:
        url = "https://raw.githubusercontent.com/LLM-Tuning-Safety/LLMs-Finetuning-Safety/main/llama2/ft_datasets/identity_shift_dataset/train.jsonl"
        found = list(load_dataset("json", data_files=url, split="train"))
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in found]


INSTRUCTIONS = "instructions/general_1100.jsonl"
INSTRUCTIONS_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"


def instructions_file(data: Path | None) -> Path:
    """General instructions with their answers, none of which is a task's."""
    path = WORK / "data" / Path(INSTRUCTIONS).name
    if data is not None:
        return data / INSTRUCTIONS
    if not path.is_file():
        rows = load_dataset("json", data_files=INSTRUCTIONS_URL, split="train")
        write_jsonl([turn(*_alpaca(row)) for row in rows], path)
    return path


PROMPTS = {  # file of prompts under --data: the same set on the hub
    "harmful/beavertails_eval_dev.jsonl": "PKU-Alignment/BeaverTails-Evaluation@test",
    "harmful/harmbench_val.jsonl": "walledai/HarmBench:standard@train",
    "harmful/catqa.jsonl": "walledai/CatHarmfulQA@en",
    "benign/coconot_contrast.jsonl": "allenai/coconot:contrast@test",
}
OKTEST = "benign/oktest.jsonl"
OKTEST_URL = "https://raw.githubusercontent.com/InvokerStark/OverKill/main/data/OKTest.csv"


def prompt_source(name: str, data: Path | None) -> str:
    """The file under --data, or the same set on the hub; OKTest, which the hub does not have, is
    fetched once.
    """
    if data is not None:
        return str(data / name)
    if name != OKTEST:
        return PROMPTS[name]
    path = WORK / "data" / Path(name).name
    if not path.is_file():
        rows = load_dataset("csv", data_files=OKTEST_URL, split="train")
        write_jsonl([{"prompt": row["prompt"]} for row in rows], path)
    return str(path)


def turn(prompt: str, response: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": response}],
        "label": response,
    }


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        SafeGeneError: It is not there.
    """
    if not path.is_file():
        raise SafeGeneError(f"{path} is not there: name the folder that holds the data sets.")
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


def write_jsonl(rows: Sequence[Row], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def batch_size(task: Task, family: Family) -> int:
    """Samples per step of a family's fine-tunes."""
    return family.batch.get(task.name, task.batch)


def training_file(task: Task, seed: int, data: Path | None, family: Family = SMOLLM2) -> Path:
    """As many rows, drawn by the seed, as the training sees; also the task's shots come from it."""
    path = family.work / "data" / f"{task.name}-{seed}.jsonl"
    if not path.is_file():
        rows = splits(task, data)[0]
        count = min(len(rows), family.steps * batch_size(task, family))
        write_jsonl(
            [
                {key: row[key] for key in ("prompt", "completion")}
                for row in random.Random(seed).sample(rows, count)
            ],
            path,
        )
    return path


def training_steps(task: Task, family: Family) -> int:
    """Steps of a fine-tune: fewer than the family's where the task has few samples."""
    most = MOST_EPOCHS * task.samples // batch_size(task, family)
    return min(family.steps, most) if task.samples else family.steps


def fine_tuned(task: Task, seed: int, data: Path | None, family: Family = SMOLLM2) -> Path:
    """The plain LoRA fine-tune of the aligned model."""
    return sft(
        fine_tune_folder(task, seed, family),
        training_file(task, seed, data, family),
        family,
        max_steps=training_steps(task, family),
        per_device_train_batch_size=batch_size(task, family),
        seed=seed,
    )


def fine_tune_folder(task: Task, seed: int, family: Family = SMOLLM2) -> Path:
    return family.work / "fine-tuned" / f"{task.name}-{seed}"


def is_trained(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def sft(folder: Path, file: Path, family: Family = SMOLLM2, **changes: Any) -> Path:
    """A fine-tune with the family's settings and the changes, unless it is there."""
    if not is_trained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = (
            family.training
            | {"datasets": [{"path": "json", "data_files": str(file), "split": "train"}]}
            | changes
        )
        settings = folder.with_suffix(".yaml")
        settings.write_text(yaml.safe_dump(recipe))
        safegene("sft", "--config", settings, "--output_dir", folder)
    return folder


def safegene(*words: object) -> None:
    """Runs a command of the package; raises `CalledProcessError` with what it printed."""
    found = subprocess.run(
        [sys.executable, "-m", "safegene_trl", *map(str, words)],
        cwd=ROOT,
        timeout=3 * 3600,
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    if found.returncode:
        print(found.stdout[-2000:], found.stderr[-4000:], sep="\n", file=sys.stderr)
        found.check_returncode()
