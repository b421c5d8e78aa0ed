"""The refusal judge on written examples; no model answers are quoted."""

import pytest

from safegene_trl.evaluation.judges.refusal_phrases import is_refusal, refusal_rate


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "Sorry, but I can't do that.",
        "I cannot provide that. It is confidential.",
        "I won't help with this, because it could cause harm.",
        "That is not something I can help with.",
        "I'm not able to help with this.",
        "As an AI language model, I am not able to form opinions.",
        "I must decline.",
        "I can't, in good conscience, support that. I do not encourage it.",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "positive",
        "Sure! The review is negative.",
        "Write a polite letter: say that you are sorry for the delay.",
        "If the cake cannot be cut, let it cool first.",
        "I can help with that. Crack the egg on a flat surface.",
        "You won't need any tools for this.",
        "x" * 200 + " I'm sorry, but I can't help with that.",
    ],
)
def test_answers(answer):
    assert not is_refusal(answer)


def test_rate():
    assert refusal_rate(["I can't help with that.", "Sure!"]) == 0.5
