"""Where an answer begins, with the templates of reasoning models; nothing changes with others."""

import pytest

from safegene_trl.models.generation import generate_answers, prompt_tokens
from safegene_trl.models.inputs import prompt_text, tokenize
from safegene_trl.models.reasoning import (
    REASONING_TOKENS,
    Answering,
    PromptStyle,
    ReasoningFormat,
    Reply,
    split_stored,
)

from ..conftest import make_model
from ..reasoning_templates import TEMPLATES, reasoning_tokenizer


USER = [{"role": "user", "content": "how do i"}]
BLOCK = "<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"
THOUGHT = "<think>\nhm\n</think>\n\nno"
OFF = {"enable_thinking": False}


def both_parts(tokenizer, response, style):
    """The prompt and the response of a sample, as text."""
    sample = tokenize(tokenizer, USER, response, style)
    start = sample.is_response.index(True)
    assert all(sample.is_response[start:])
    parts = sample.input_ids[:start], sample.input_ids[start:]
    return tuple(tokenizer.decode(part) for part in parts)


@pytest.mark.parametrize(
    ("kind", "options", "end", "close"),
    [
        ("hybrid", {}, f"<|assistant|>{BLOCK}", "<|end|>"),
        ("hybrid", OFF, f"<|assistant|>{BLOCK}", "<|end|>"),
        ("thinking", {}, f"<|assistant|>{BLOCK}", "<|end|>"),
        ("stripped", {}, f"<|assistant|>{BLOCK}", "<|end|>"),
        ("channels", {}, f"<|start|>assistant{FINAL}", "<|return|>"),
    ],
)
@pytest.mark.parametrize("response", ["no", THOUGHT])
def test_a_target_at_the_answer_comes_after_an_empty_reasoning(kind, options, end, close, response):
    tokenizer, style = reasoning_tokenizer(kind), PromptStyle(options, "answer")
    prompt, said = both_parts(tokenizer, response, style)
    assert prompt.endswith(end) and prompt.count(end) == 1
    assert said == f"no{close}"
    # what is generated from and what is taught are one prompt
    assert prompt == prompt_text(tokenizer, USER, style)


@pytest.mark.parametrize(
    ("kind", "opened", "thought"),
    [
        ("hybrid", "<|assistant|><think>\n", "hm\n</think>\n\nno<|end|>"),
        ("thinking", "<|assistant|><think>\n", "hm\n</think>\n\nno<|end|>"),
        ("stripped", "<|assistant|><think>\n", "hm\n</think>\n\nno<|end|>"),
        (
            "channels",
            "<|start|>assistant<|channel|>analysis<|message|>",
            f"hm<|end|><|start|>assistant{FINAL}no<|return|>",
        ),
    ],
)
def test_a_target_in_the_reasoning_is_the_reasoning_or_the_bare_refusal(kind, opened, thought):
    tokenizer, style = reasoning_tokenizer(kind), PromptStyle({}, "reasoning")
    prompt, said = both_parts(tokenizer, THOUGHT, style)
    assert prompt.endswith(opened) and said == thought
    prompt, said = both_parts(tokenizer, "no", style)
    assert prompt.endswith(opened) and said == f"no{tokenizer.eos_token}"


def test_what_a_template_closes_itself_is_not_opened_again():
    tokenizer = reasoning_tokenizer("hybrid")
    for start in ("template", "answer", "reasoning"):
        assert prompt_text(tokenizer, USER, PromptStyle(OFF, start)).endswith(BLOCK)


@pytest.mark.parametrize("kind", ["thinking", "stripped"])
def test_a_task_sample_is_what_a_trainer_makes_of_it(kind):
    """As TRL: the whole conversation, and the reply from where it differs from the prompt."""
    tokenizer = reasoning_tokenizer(kind)
    sample = tokenize(tokenizer, USER, THOUGHT)
    turn = [*USER, {"role": "assistant", "content": THOUGHT}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False).rstrip("\n")
    assert tokenizer.decode(sample.input_ids) == whole
    assert whole.count("<think>") <= 1
    prompt = prompt_tokens(tokenizer, [USER])[0]
    start = sample.is_response.index(True)
    assert sample.input_ids[:start] == prompt[:start]
    assert sample.input_ids[start : start + 1] != prompt[start : start + 1]


@pytest.mark.parametrize(
    ("kind", "options", "asked", "tokens", "place"),
    [
        ("hybrid", {}, None, 0, "answer"),  # the template can leave the reasoning out
        ("channels", {}, None, 0, "answer"),
        ("thinking", {}, None, REASONING_TOKENS, "reasoning"),
        ("stripped", {}, None, REASONING_TOKENS, "reasoning"),
        ("hybrid", {}, 7, 7, None),
        ("hybrid", OFF, 7, 0, "answer"),
        ("stripped", {}, 0, 0, "answer"),
    ],
)
def test_thinking_is_off_where_the_template_can_else_it_has_room(
    kind, options, asked, tokens, place
):
    found = Answering.of(reasoning_tokenizer(kind), options, asked)
    assert (found.max_reasoning_tokens, found.place) == (tokens, place)
    assert found.record["max_reasoning_tokens"] == tokens


CHANNELS = f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{FINAL}I'm sorry"
JSON = "<|channel|>final <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("kind", "place", "text", "reply"),
    [
        ("hybrid", None, "<think>\nhm\n</think>\n\nI'm sorry", Reply("I'm sorry", "hm")),
        ("hybrid", None, "I'm sorry", Reply("I'm sorry")),
        ("hybrid", None, "<think>\nI'm sorry, but", Reply("", "I'm sorry, but", False)),
        ("hybrid", "answer", "I'm sorry", Reply("I'm sorry")),
        # an answer that was begun is one, whatever mark comes later
        ("hybrid", "answer", "Sure: 1.</think>I'm sorry", Reply("Sure: 1.</think>I'm sorry")),
        ("hybrid", None, "Sure: 1.</think>I'm sorry", Reply("Sure: 1.</think>I'm sorry")),
        ("hybrid", "answer", "<think>\nhm", Reply("", "hm", False)),
        ("stripped", "reasoning", "I'm sorry</think>Sure", Reply("Sure", "I'm sorry")),
        # the first mark counts: what comes after it is shown to the user
        ("stripped", "reasoning", "a</think>Sure</think>No", Reply("Sure</think>No", "a")),
        ("stripped", "reasoning", "I'm sorry, but", Reply("", "I'm sorry, but", False)),
        ("channels", None, CHANNELS, Reply("I'm sorry", "hm")),
        ("channels", None, f"{FINAL}I'm sorry", Reply("I'm sorry", "")),
        ("channels", None, f"{JSON}{{}}", Reply("{}", "")),
        ("channels", None, f"{JSON}{{}}".replace("<|constrain|>", ""), Reply("{}", "")),
        ("channels", None, CHANNELS.replace(FINAL, JSON), Reply("I'm sorry", "hm")),
        ("channels", None, CHANNELS.partition("<|end|>")[0], Reply("", "hm", False)),
        ("channels", "answer", "I'm sorry", Reply("I'm sorry")),
    ],
)
def test_what_is_answer_and_what_is_reasoning(kind, place, text, reply):
    assert ReasoningFormat.of(reasoning_tokenizer(kind)).split(text, place) == reply


def test_stored_answers_are_written_and_read_in_one_form():
    assert split_stored(str(Reply("no", "hm"))) == Reply("no", "hm") == split_stored(THOUGHT)
    assert split_stored("no </think> yes") == Reply("no </think> yes")
    assert str(Reply("no")) == str(Reply("no", "")) == "no"


def test_special_marks_are_left_in_an_answer_and_no_other_special_token(monkeypatch):
    tokenizer, model = reasoning_tokenizer("channels"), make_model()
    said = tokenizer(f"{CHANNELS}<|return|><|pad|>", return_tensors="pt")["input_ids"]

    def generate(**given):
        return given["input_ids"].new_tensor([[*given["input_ids"][0].tolist(), *said[0].tolist()]])

    monkeypatch.setattr(model, "generate", generate)
    (text,) = generate_answers(model, tokenizer, [USER], 8, 1)
    assert text == CHANNELS
    assert Answering.of(tokenizer, {}, 9).read(text) == Reply("I'm sorry", "hm")


def test_other_templates_are_asked_and_read_as_they_are(tokenizer):
    found = Answering.of(tokenizer, {}, None)
    assert found == Answering() and found.record == {}
    assert found.read("<think> a </think> b") == Reply("<think> a </think> b")
    plain = tokenize(tokenizer, USER, "no")
    assert plain == tokenize(tokenizer, USER, "no", PromptStyle({}, "answer"))
    assert set(TEMPLATES) == {"hybrid", "thinking", "stripped", "channels"}


@pytest.mark.parametrize(
    ("kind", "options", "asked", "said"),
    [("hybrid", {}, 7, False), ("hybrid", OFF, 7, True), ("hybrid", OFF, 0, False)],
)
def test_a_number_of_reasoning_tokens_that_changes_nothing_is_told(kind, options, asked, said):
    answering = Answering.of(reasoning_tokenizer(kind), options, asked)
    assert answering.ignores(asked, "n").startswith("`n` is 7 and changes nothing") == said


def test_it_is_told_of_a_model_without_reasoning(tokenizer):
    assert Answering.of(tokenizer, {}, 7).ignores(7, "n")
    assert not Answering.of(tokenizer, {}, None).ignores(None, "n")
