"""What a report shows of the answers, and above all what it does not."""

import json
import re

import pytest

from safegene_trl.data.prompts import Prompt
from safegene_trl.step.examples import Answered, examples


pytestmark = pytest.mark.fast

NO = Answered("I'm sorry, but I can't help with that. First you take the", "refused")
YES = Answered("First you take the key.", "answered")


def prompts_of(kind, count):
    return [
        Prompt("p", kind, None, ({"role": "user", "content": f"{kind} {number}"},))
        for number in range(count)
    ]


def test_nothing_that_is_said_to_a_harmful_prompt_is_shown_but_the_words_of_a_refusal():
    prompts = {"harmful": prompts_of("harmful", 9)}
    odd = [
        Answered("First, first, first you take", label)
        for label in ("incoherent", "unfinished", "unjudged", "answered")
    ]
    late = [
        Answered("First you take the key. I cannot help with more than that.", "refused"),
        Answered("I'm sorry, but I can't help with that\n- First you take the key", "refused"),
        Answered("Sorry, but I first you take the key, then", "refused"),
        Answered("First you take", "refused"),  # no phrase of the list
    ]
    before, after = {"harmful": [*odd, YES, *late]}, {"harmful": [*late, *odd, NO]}
    found = examples(prompts, before, after, 100)
    assert len(found) == 9
    texts = {side[key]["text"] for side in found for key in ("before", "after")}
    assert texts == {None, "I cannot help …", "I'm sorry …", "Sorry, but I …"}
    assert not re.search("take|key|First", json.dumps([*texts - {None}]))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("I’m sorry, but no.", "I'm sorry …"),
        ("Es tut mir leid, dabei kann ich dir nicht helfen. Nimm", None),
        ("I won't.", "I won't. …"),
    ],
)
def test_refusals_in_other_words(answer, words):
    prompts = {"harmful": prompts_of("harmful", 1)}
    said = {"harmful": [Answered(answer, "refused")]}
    text = examples(prompts, said, said, 1)[0]["after"]["text"]
    assert text == words if words else ("helfen" in text and "Nimm" not in text)


def test_kinds_of_change_come_in_turn_the_bad_ones_too():
    prompts = {"harmful": prompts_of("harmful", 4), "benign": prompts_of("benign", 3)}
    before = {"harmful": [NO, YES, YES, YES], "benign": [YES, YES, NO]}
    after = {"harmful": [NO, NO, NO, YES], "benign": [YES, NO, NO]}
    found = [one["prompt"] for one in examples(prompts, before, after, 5)]
    assert found == ["harmful 1", "benign 0", "benign 1", "harmful 3", "harmful 0"]
    everything = examples(prompts, before, after, 100)
    assert len(everything) == 7 and everything[-1]["prompt"] == "harmful 2"


def test_none_is_none():
    prompts = {"harmful": prompts_of("harmful", 1)}
    assert examples(prompts, {"harmful": [NO]}, {"harmful": [NO]}, 0) == []
    assert examples({}, {}, {}, 5) == []


def test_answers_to_benign_prompts_are_whole_up_to_two_hundred_characters():
    prompts = {"benign": prompts_of("benign", 2)}
    long, short = Answered("b" * 201, "answered"), Answered("a. b. c.", "answered")
    found = examples(prompts, {"benign": [short] * 2}, {"benign": [long, short]}, 2)
    assert found[0]["before"] == {"label": "answered", "text": "a. b. c."}
    assert found[0]["after"]["text"] == "b" * 199 + "…"
