"""Which of the aligned model's answers come with a vector."""

import pytest

from safegene_trl.errors import FamilyError
from safegene_trl.extraction import answers
from safegene_trl.extraction.answers import Asked, own_answers
from safegene_trl.models.reasoning import Answering

from ..conftest import ALONE
from ..reasoning_templates import reasoning_tokenizer


HARMFUL, BENIGN = ["harm 1", "harm 2", "harm 3", "harm 4"], ["dish 1", "dish 2"]
SAID = {
    "harm 1": "They ask for harm.</think>\n\nI can't help with that. And",
    "harm 2": "I can't help with that.</think>Here is how.",  # it complies after all
    "harm 3": "I'm sorry, but I can't",  # reasoning that was cut off
    "harm 4": "</think>I'm sorry, but no.",
    "dish 1": "I cannot see harm.</think>Take a pan.",
    "dish 2": "Harmless.</think>I can't help with that.",
}


def stored(monkeypatch, with_reasoning=False, harmful=HARMFUL):
    tokenizer = reasoning_tokenizer("stripped")
    asked = []

    def generate(model, tokenizer, prompts, new_tokens, *rest):
        asked.append(new_tokens)
        return [SAID[prompt[-1]["content"]] for prompt in prompts]

    monkeypatch.setattr(answers, "generate_answers", generate)
    how = Asked(Answering.of(tokenizer, {}, 100), 48, with_reasoning)
    rows = own_answers(None, tokenizer, harmful, BENIGN, how, 4, ALONE)
    assert set(asked) == {148}
    return {row["prompt"]: row["response"] for row in rows}


def test_refusals_are_stored_without_the_reasoning_or_with_it(monkeypatch):
    assert stored(monkeypatch) == {
        "harm 1": "I can't help with that.",
        "harm 4": "I'm sorry, but no.",
        "dish 1": "Take a pan.",
    }
    assert stored(monkeypatch, with_reasoning=True) == {
        "harm 1": "<think>\nThey ask for harm.\n</think>\n\nI can't help with that.",
        "harm 4": "I'm sorry, but no.",
        "dish 1": "<think>\nI cannot see harm.\n</think>\n\nTake a pan.",
    }


def test_a_model_that_only_thinks_is_told_from_one_that_complies(monkeypatch):
    with pytest.raises(FamilyError, match="1 of 1 answers never left the reasoning: raise"):
        stored(monkeypatch, harmful=["harm 3"])
    with pytest.raises(FamilyError, match="align it first"):
        stored(monkeypatch, harmful=["harm 2"])
