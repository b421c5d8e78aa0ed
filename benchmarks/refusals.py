"""Refusal and answered rates of a model on prompt files, with what is needed to compare runs.

    python benchmarks/refusals.py MODEL --harmful FILE … --benign FILE … --limit 60 --output benchmarks/results/NAME.json

Each file is JSON lines with a column `prompt`. Rates come with 95 % Wilson intervals.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from scipy.stats import binomtest

from safegene_trl.calibration import conversation, draw, load_rows
from safegene_trl.evaluation.generation import generate_answers
from safegene_trl.evaluation.judges.refusal_phrases import is_refusal
from safegene_trl.loading import load_model, load_tokenizer
from safegene_trl.provenance import sha256_of_json, software_versions


def measure(model, tokenizer, file: Path, limit: int) -> dict:
    """Refusals among greedy answers (32 tokens) to a seeded sample of the file's prompts."""
    prompts = [conversation(row)[0] for row in draw(load_rows(str(file), "train"), limit, seed=0)]
    refused = sum(map(is_refusal, generate_answers(model, tokenizer, prompts, max_new_tokens=32, batch_size=32)))
    interval = binomtest(refused, len(prompts)).proportion_ci(method="wilson")
    return {
        "file": file.name,
        "prompts": len(prompts),
        "sha256": sha256_of_json(prompts),
        "refused": refused / len(prompts),
        "refused_95": [interval.low, interval.high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint or adapter: directory or hub id")
    parser.add_argument("--harmful", type=Path, nargs="*", default=[])
    parser.add_argument("--benign", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=60, help="prompts per file")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    result = {
        "model": Path(arguments.model).name,
        "judge": "refusal_phrases",
        "harmful": [measure(model, tokenizer, file, arguments.limit) for file in arguments.harmful],
        "benign": [measure(model, tokenizer, file, arguments.limit) for file in arguments.benign],
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "software": software_versions(),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
