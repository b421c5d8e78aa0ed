"""The aligned model's own answers: in batches that its device has memory for, and which of them
come with a vector.
"""

import pytest
import torch

from safegene_trl.errors import ConfigError, FamilyError, MemoryShortageError
from safegene_trl.extraction import answers as module
from safegene_trl.extraction.answers import Asked, own_answers, own_verdicts
from safegene_trl.models import batch_size as sizes_module
from safegene_trl.models import generation
from safegene_trl.models.reasoning import Answering

from ..conftest import ALONE, BENIGN, HARMFUL, make_model, refusing
from ..reasoning_templates import reasoning_tokenizer


@pytest.fixture
def sizes(monkeypatch):
    """Batch sizes that are asked for, as they come."""
    seen = []

    def answers(model, tokenizer, prompts, new_tokens, batch_size, sharding):
        seen.append(batch_size)
        return refusing(model, tokenizer, prompts)

    monkeypatch.setattr(module, "answers_to_tokens", answers)
    return seen


def own(tokenizer, batch_size, harmful=HARMFUL):
    asked = Asked(Answering.of(tokenizer, {}, None), 8)
    return own_answers(make_model(), tokenizer, harmful, BENIGN, asked, batch_size, ALONE)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 16), (3, 3)])
def test_on_a_cpu_there_are_16_or_what_is_set(wanted, expected, tokenizer, sizes):
    assert len(own(tokenizer, wanted)) == len(HARMFUL) + len(BENIGN)
    assert sizes == [expected, expected]


def test_a_gpu_takes_what_its_memory_is_for(tokenizer, sizes, monkeypatch):
    monkeypatch.setattr(sizes_module, "has_own_memory", lambda device: True)
    for free in (2**38, 2**21, 1):
        monkeypatch.setattr(sizes_module, "free_bytes", lambda device, free=free: free)
        own(tokenizer, None)
        own(tokenizer, 5)
    assert sizes[0::4] == sizes[1::4] and sizes[2::4] == sizes[3::4] == [5, 5, 5]
    large, middle, small = sizes[0::4]
    assert large == 128 and 128 > middle > 1 and small == 1


def test_memory_that_runs_out_halves_the_batches_and_that_is_remembered(tokenizer, monkeypatch):
    asked, texts = [], []

    def small(model, tokenizer, prompts, new_tokens, batch_size, sharding):
        asked.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return refusing(model, tokenizer, prompts)

    expected = [
        {"prompt": prompt, "response": text, "kind": kind}
        for kind, prompts, text in (
            ("harmful", HARMFUL, "I can't help with that."),
            ("benign", BENIGN, "Take a pan."),
        )
        for prompt in prompts
    ]
    text = generation.prompt_text
    monkeypatch.setattr(
        generation, "prompt_text", lambda *given: texts.append(True) or text(*given)
    )
    monkeypatch.setattr(module, "answers_to_tokens", small)
    assert own(tokenizer, None) == expected
    # harmful prompts, then benign ones; each is tokenised once
    assert asked == [16, 8, 4, 4] and len(texts) == len(HARMFUL) + len(BENIGN)


def test_what_does_not_fit_and_what_is_not_refused_are_named(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "answers_to_tokens", lambda *given: ["Sure!"] * len(given[2]))
    with pytest.raises(FamilyError, match="refuses none"):
        own(tokenizer, None)

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "answers_to_tokens", full)
    with pytest.raises(MemoryShortageError, match="The extraction ran out of memory with one"):
        own(tokenizer, None)


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


def test_refusals_are_kept_and_answers_to_benign_prompts_and_no_others(tokenizer, monkeypatch):
    def said(model, tokenizer, prompts, *rest):
        asked = map(tokenizer.decode, prompts)
        return [next(SAID[key] for key in SAID if key in text) for text in asked]

    monkeypatch.setattr(module, "answers_to_tokens", said)
    harmful, benign = (sorted(prompt for prompt in SAID if prompt[0] == kind) for kind in "hb")
    asked = Asked(Answering.of(tokenizer, {}, None), 8)
    rows = own_answers(make_model(), tokenizer, harmful, benign, asked, 8, ALONE)
    assert [row["prompt"] for row in rows] == ["h1", "h2", "b1", "b2", "b4"]
    # a benign prompt that is refused says so
    assert [row.get("verdict") for row in rows] == [None] * 4 + ["refused"]
    assert rows[-1]["response"] == SAID["b4"] and rows[-1]["kind"] == "benign"


def test_of_prompts_to_measure_on_the_verdict_is_kept_and_no_answer(monkeypatch):
    """As the safety step's judge judges."""
    tokenizer = reasoning_tokenizer("stripped")
    said = THOUGHT | {"dish 3": "</think>zx qv " * 9, "dish 4": f"</think>{SAID['b3']}"}

    def generate(model, tokenizer, prompts, new_tokens, *rest):
        assert new_tokens == 32 + 100
        texts = map(tokenizer.decode, prompts)
        return [next(said[key] for key in said if key in text) for text in texts]

    monkeypatch.setattr(module, "answers_to_tokens", generate)
    prompts = {
        kind: sorted(key for key in said if key.startswith(kind[:1].replace("b", "d")))
        for kind in ("harmful", "benign")
    }
    asked = Asked(Answering.of(tokenizer, {}, 100), 32)
    rows, counts = own_verdicts(make_model(), tokenizer, prompts, asked, 4, ALONE)
    assert rows == [
        {"prompt": prompt, "kind": kind, "verdict": verdict, "use": "measure"}
        for prompt, kind, verdict in (
            ("harm 1", "harmful", "refused"),
            ("harm 2", "harmful", "answered"),
            ("harm 4", "harmful", "refused"),
            ("dish 1", "benign", "answered"),
            ("dish 2", "benign", "refused"),
        )
    ]
    assert counts == {
        "harmful": {"answered": 1, "refused": 2, "unfinished": 1},
        "benign": {"answered": 1, "incoherent": 1, "refused": 1, "unjudged": 1},
    }


THOUGHT = {
    "harm 1": "They ask for harm.</think>\n\nI can't help with that. And",
    "harm 2": "I can't help with that.</think>Here is how.",  # it complies after all
    "harm 3": "I'm sorry, but I can't",  # reasoning that was cut off
    "harm 4": "</think>I'm sorry, but no.",
    "dish 1": "I cannot see harm.</think>Take a pan.",
    "dish 2": "Harmless.</think>I can't help with that.",
}


def stored(monkeypatch, with_reasoning=False, harmful=("harm 1", "harm 2", "harm 3", "harm 4")):
    tokenizer = reasoning_tokenizer("stripped")
    asked = []

    def generate(model, tokenizer, prompts, new_tokens, *rest):
        asked.append(new_tokens)
        texts = map(tokenizer.decode, prompts)
        return [next(THOUGHT[key] for key in THOUGHT if key in text) for text in texts]

    monkeypatch.setattr(module, "answers_to_tokens", generate)
    how = Asked(Answering.of(tokenizer, {}, 100), 48, with_reasoning)
    benign = ["dish 1", "dish 2"]
    rows = own_answers(make_model(), tokenizer, harmful, benign, how, 4, ALONE)
    assert set(asked) == {148}
    return {row["prompt"]: row["response"] for row in rows}


def test_a_context_without_room_for_the_reasoning_is_refused_and_with_little_room_warned_of(
    monkeypatch, caplog
):
    tokenizer = reasoning_tokenizer("stripped")
    monkeypatch.setattr(
        module, "answers_to_tokens", lambda *given: ["</think>I can't."] * len(given[2])
    )

    def asked(context, most):
        model = make_model()
        model.config.max_position_embeddings = context
        how = Asked(Answering.of(tokenizer, {}, most), 8)
        own_answers(model, tokenizer, ["harm", "harm " * 20], [], how, 4, ALONE)

    with pytest.raises(
        ConfigError, match=r"`max_reasoning_tokens` is 1024.*after any prompt"
    ) as error:
        asked(128, None)
    room = int(str(error.value).split()[-3])
    assert 64 < room < 120 and not caplog.text
    asked(128, room)
    assert "1 of 2 prompts leave the model's context of 128 tokens no room" in caplog.text
    caplog.clear()
    asked(256, room)
    assert not caplog.text


def test_refusals_are_stored_without_the_reasoning_or_with_it(monkeypatch):
    assert stored(monkeypatch) == {
        "harm 1": "I can't help with that.",
        "harm 4": "I'm sorry, but no.",
        "dish 1": "Take a pan.",
        "dish 2": "I can't help with that.",
    }
    assert stored(monkeypatch, with_reasoning=True) == {
        "harm 1": "<think>\nThey ask for harm.\n</think>\n\nI can't help with that.",
        "harm 4": "I'm sorry, but no.",
        "dish 1": "<think>\nI cannot see harm.\n</think>\n\nTake a pan.",
        "dish 2": "<think>\nHarmless.\n</think>\n\nI can't help with that.",
    }


def test_a_model_that_only_thinks_is_told_from_one_that_complies(monkeypatch):
    with pytest.raises(FamilyError, match="1 of 1 answers never left the reasoning: raise"):
        stored(monkeypatch, harmful=["harm 3"])
    with pytest.raises(FamilyError, match=r"\(its answers: 1 answered\): align it first"):
        stored(monkeypatch, harmful=["harm 2"])
    with pytest.raises(FamilyError, match=r"\(.*1 unfinished.*\), and 1 of 2 answers never left"):
        stored(monkeypatch, harmful=["harm 2", "harm 3"])


def test_a_model_that_refuses_nothing_is_told_what_it_says_instead(tokenizer, monkeypatch):
    said = {"h1": "Take a pan.", "h2": "", "h3": SAID["h3"], "h4": "Take a pan."}
    monkeypatch.setattr(
        module, "answers_to_tokens", lambda model, tokenizer, prompts, *rest: [*said.values()]
    )
    counts = r"\(its answers: 2 answered, 1 incoherent, 1 unjudged\): align it first"
    with pytest.raises(FamilyError, match=counts) as refused:
        own(tokenizer, None, harmful=list(said))
    assert "pan" not in str(refused.value)  # counts, and no text of the model
