"""The prompts that the study draws its shots from: more than a vector ships, with what the aligned
model itself says to each.
"""

import json
from dataclasses import asdict
from typing import Any

from benchmarks.paper_table.families import MODELS, RECIPE
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import prompt_source, read_jsonl
from safegene_trl.data.prompts import Prompt, kept_apart, load_prompts, near_duplicates, spread
from safegene_trl.data.sources import draw
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.extraction.aligned_rows import REFUSAL_TOKENS
from safegene_trl.extraction.answers import whole_sentences
from safegene_trl.extraction.soft_targets import soft_targets
from safegene_trl.judges.coherence import is_incoherent
from safegene_trl.judges.refusal_phrases import label_of
from safegene_trl.models.inputs import padding_id, shortened, tokenize


Rows = list[dict[str, Any]]
HARMFUL = 320  # of CategoricalHarmfulQA, as many of every category
OTHER = 240
NEW_TOKENS = 48
BENIGN_PROMPTS = MODELS / "benign_prompts.jsonl"


def bank(lab: Lab) -> Rows:
    """Rows of `prompt`, `response`, `targets` and `kind`: `harmful` ones that the aligned model
    refuses, `other` ones, which are harmful and of other sources, `benign` ones that it answers, and
    `border`, benign ones that it refuses. None repeats a prompt that is measured on. Made once.
    """
    path = lab.family.work / "study" / "bank.json"
    if not path.is_file():
        rows = _with_targets(lab, _answered(lab))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return list(json.loads(path.read_text(encoding="utf-8")))


def _answered(lab: Lab) -> Rows:
    asked = [(prompt.text, "harmful") for prompt in _harmful(lab)]
    asked += [(text, "other") for text in _other(lab)]
    benign = [row["prompt"] for row in read_jsonl(BENIGN_PROMPTS)]
    asked += [(text, "benign") for text in benign[: max(8, round(len(benign) * lab.scale))]]
    messages = [[{"role": "user", "content": text}] for text, _ in asked]
    size = 16 if lab.device.type == "cpu" else 256
    answers = lab.answers(messages, NEW_TOKENS, size)
    rows = []
    for (text, kind), answer in zip(asked, answers, strict=True):
        response = whole_sentences(answer)
        refused = label_of(response) == "refused"
        if not response or is_incoherent(response) or (kind != "benign" and not refused):
            continue
        kind = "border" if kind == "benign" and refused else kind
        rows.append({"prompt": text, "response": response, "kind": kind})
    return rows


def _harmful(lab: Lab) -> list[Prompt]:
    source = prompt_source("harmful/catqa.jsonl", lab.data)
    found = kept_apart(load_prompts(source, "harmful", "train", None, 0), _measured(lab))[0]
    return spread(found, max(4, round(HARMFUL * lab.scale)), 0)


def _other(lab: Lab) -> list[str]:
    """The prompts of StrongREJECT and Do-Not-Answer that the demonstration was aligned with."""
    rows = read_jsonl(MODELS / "safety_prompts.jsonl")
    texts = [row["prompt"] for row in rows]
    refusals = json.loads((RECIPE / "data" / "refusals.json").read_text(encoding="utf-8"))
    known = {text for kind in refusals.values() for text in kind}
    for row in read_jsonl(MODELS / "align.jsonl"):
        if row["completion"][0]["content"] in known:
            texts.append(row["prompt"][0]["content"])
    repeated = near_duplicates(texts, _measured(lab))
    left = [text for index, text in enumerate(texts) if index not in repeated]
    return draw(left, max(4, round(OTHER * lab.scale)), 0)


def _measured(lab: Lab) -> list[str]:
    return [prompt.text for prompts in lab.prompts.values() for prompt in prompts]


def _with_targets(lab: Lab, rows: Rows) -> Rows:
    cut = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        sample = tokenize(lab.tokenizer, messages, row["response"])
        cut.append(shortened(sample, None, REFUSAL_TOKENS))
    samples = [sample for sample in cut if sample]
    assert len(samples) == len(rows)
    pad_id, sharding = padding_id(lab.tokenizer), Sharding(lab.device)
    size = 8 if lab.device.type == "cpu" else 64
    found = soft_targets(lab.model, samples, pad_id, sharding, size)
    return [
        row | {"targets": asdict(own)} for row, own in zip(rows, found, strict=True) if own.tokens
    ]
