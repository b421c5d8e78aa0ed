"""Whose answers come with a vector."""

from safegene_trl.extraction import answers
from safegene_trl.extraction.answers import own_answers

from ..conftest import ALONE


SAID = {
    "h1": "I can't help with that.",
    "h2": "Dabei kann ich leider nicht helfen.",
    "h3": "Niestety nie mogę pomóc w tej sprawie.",
    "h4": "Take a pan.",
    "b1": "Take a pan.",
    "b2": "Nimm eine Pfanne und rühre um.",
    # whether it refuses nobody knows
    "b3": "Niestety nie mogę pomóc w tej sprawie.",
    "b4": "Das kann ich nicht beantworten.",
}


def test_answers_that_refuse_harmful_prompts_or_answer_benign_ones_are_kept(monkeypatch):
    def generate(model, tokenizer, messages, *rest):
        return [SAID[turns[-1]["content"]] for turns in messages]

    monkeypatch.setattr(answers, "generate_answers", generate)
    harmful, benign = (sorted(prompt for prompt in SAID if prompt[0] == kind) for kind in "hb")
    rows = own_answers(None, None, harmful, benign, 8, 8, ALONE)
    assert [row["prompt"] for row in rows] == ["h1", "h2", "b1", "b2"]
