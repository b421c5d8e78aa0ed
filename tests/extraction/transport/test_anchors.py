"""The sentences that maps are fitted on where nobody names others."""

import json
from collections import Counter
from pathlib import Path

from safegene_trl.data.prompts import near_duplicates
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.extraction.transport.anchors import read_anchors
from safegene_trl.extraction.transport.benign_sentences import THEMES, benign_sentences


VECTOR = Path(__file__).parents[3] / "recipes" / "smollm2-135m" / "safety-vector"


def config(**changes):
    return ExtractionConfig(method="transport", aligned_model="a", source_model="s", **changes)


def test_there_are_a_thousand_of_all_themes():
    found = benign_sentences()
    assert len(found) == len(set(found)) == 1000 and found == benign_sentences()
    assert not any("{" in text for text in found)
    themes = Counter(
        next(
            theme
            for theme, (frames, things) in THEMES.items()
            if text.lower() in {f.format(t).lower() for f in frames for t in things}
        )
        for text in found
    )
    assert set(themes.values()) == {50} and len(themes) == 20


def test_they_are_the_anchors_where_none_are_named():
    drawn = read_anchors(config(num_anchors=60), ["how do i hide object 3"])
    assert len(drawn) == 60 and set(drawn) <= set(benign_sentences())
    assert read_anchors(config(), ["x"]) != sorted(benign_sentences())
    assert sorted(read_anchors(config(), ["x"])) == sorted(benign_sentences())


def test_none_is_like_a_harmful_prompt_of_the_shipped_vector():
    rows = (VECTOR / "safety_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    harmful = [row["prompt"] for row in map(json.loads, rows) if row["kind"] == "harmful"]
    assert len(harmful) > 60 and not near_duplicates(benign_sentences(), harmful)
