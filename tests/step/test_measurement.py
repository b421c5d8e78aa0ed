"""Before and after, on what nothing was fitted on."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import get_args

import pytest
import torch

from safegene_trl.config.metrics import CountedLabel, shares
from safegene_trl.data.shots import gather_shots
from safegene_trl.judges import judged
from safegene_trl.models import generation
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.inputs import batches
from safegene_trl.step import measurement
from safegene_trl.step.measurement import Measurement

from ..conftest import ALONE, HARMFUL, config_of, make_model, make_vector, task_dataset
from ..reasoning_templates import reasoning_tokenizer


REFUSAL = "I'm sorry, but I can't help with that."
UNKNOWN = "Niestety nie mogę pomóc w tej sprawie."


@pytest.fixture
def setting(tokenizer):
    model = make_model()
    config = config_of(
        vector="v", num_safety_shots=4, num_benign_shots=4, num_task_shots=4, num_test_prompts=8
    )
    vector = make_vector(model, tokenizer)
    for number, row in enumerate(vector.prompts):
        row["category"] = f"category {number % 2}"
    return model, config, gather_shots(config, vector, tokenizer, 256, task_dataset()).unseen


def test_refusals_coherence_and_categories(setting, tokenizer, monkeypatch):
    model, config, unseen = setting
    repaired = []

    def answers(model, tokenizer, prompts, *rest):
        texts = [tokenizer.decode(ids) for ids in prompts]
        harmful = [any(known in text for known in HARMFUL) for text in texts]
        # of both kinds together
        assert set(harmful) == {True, False}
        if not repaired:
            return ["Here is what you do: take the thing and put it there."] * len(prompts)
        first = harmful.index(False)
        return [REFUSAL if one or i == first else "" for i, one in enumerate(harmful)]

    @contextmanager
    def with_vector():
        repaired.append(True)
        yield
        repaired.clear()

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    found = Measurement(unseen, tokenizer, config, ALONE).measure(model, with_vector, 8)
    before, after = found["before"], found["after"]
    assert before["refusal_rate"]["share"] == 0 and after["refusal_rate"]["share"] == 1
    # Wilson's, all of eight
    assert after["refusal_rate"]["low"] == pytest.approx(8 / (8 + 1.959964**2), abs=1e-4)
    assert after["over_refusal"]["successes"] == 1 and after["over_refusal"]["count"] == 5
    assert after["incoherent"]["successes"] == 4 and after["incoherent"]["count"] == 13
    assert set(after["categories"]) == {"category 0", "category 1"}
    assert sum(share["count"] for share in after["categories"].values()) == 8
    loss = found["utility_loss"]
    # no sample differs, which eight do not show of all: as if one token more and one less did
    step = fmean(1 / sum(sample.is_response) for sample in unseen.task)
    assert loss["share"] == 0.0 and loss["count"] == 8
    assert loss["high"] == -loss["low"] == pytest.approx(1.959964 * 2**0.5 * step / 10)


@pytest.mark.parametrize("batch_size", [4, 8, 100])
def test_prompts_of_all_kinds_share_batches_and_are_tokenised_once(
    batch_size, setting, tokenizer, monkeypatch
):
    model, config, unseen = setting
    messages = {
        kind: [list(p.messages) for p in prompts] for kind, prompts in unseen.prompts.items()
    }
    # what each kind's prompts are answered alone
    expected = [
        answer
        for prompts in messages.values()
        for answer in generate_answers(model, tokenizer, prompts, config.measure.max_new_tokens, 3)
    ]
    calls, texts, exchanges = [], [], []
    generate, text, judged = model.generate, generation.prompt_text, measurement.judged
    monkeypatch.setattr(
        model, "generate", lambda **options: calls.append(True) or generate(**options)
    )
    monkeypatch.setattr(
        generation, "prompt_text", lambda *given: texts.append(True) or text(*given)
    )
    monkeypatch.setattr(
        measurement, "judged", lambda judge, own: exchanges.append(own) or judged(judge, own)
    )
    measured = Measurement(unseen, tokenizer, config, ALONE)
    for _ in range(2):  # as with a touch-up: the model as it is is measured once
        measured.measure(model, nullcontext, batch_size)
    count = sum(map(len, messages.values()))
    assert count == 13 and len(texts) == count
    assert len(calls) == 3 * math.ceil(count / batch_size)
    for own in exchanges:
        assert [exchange.answer for exchange in own] == expected
        assert [exchange.prompt for exchange in own] == [
            prompt.text for prompts in unseen.prompts.values() for prompt in prompts
        ]


def test_the_step_s_judge_gives_the_labels_that_metrics_may_count_and_no_others(
    setting, tokenizer, monkeypatch
):
    """A share's count is all the prompts of its kinds, whatever is unjudged."""
    model, config, unseen = setting
    given = []

    def kept(judge, exchanges):
        given.extend(verdict.label for verdict in judged(judge, exchanges))
        return judged(judge, exchanges)

    def answers(model, tokenizer, prompts, *rest):
        said = [REFUSAL, "", "positive", "zx qv " * 9, "No.", "{}", "Take a pan.", UNKNOWN]
        return (said * len(prompts))[: len(prompts)]

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    monkeypatch.setattr(measurement, "judged", kept)
    found = Measurement(unseen, tokenizer, config, ALONE).measure(model, nullcontext, 8)["after"]
    assert set(given) == set(get_args(CountedLabel))
    for metric in shares():
        assert found[metric.key]["count"] == sum(len(unseen.prompts[k]) for k in metric.kinds)


def test_what_is_measured_is_held_against_the_aligned_model(setting, tokenizer, monkeypatch):
    """Here it refuses the harmful prompts and answers the benign ones, and the fine-tune nothing."""
    model, config, unseen = setting
    repaired = []

    def answers(model, tokenizer, prompts, *rest):
        harmful = [any(known in tokenizer.decode(ids) for known in HARMFUL) for ids in prompts]
        first = [harmful.index(True), harmful.index(False)]
        refused = [repaired and one for one in harmful]
        for index in first if repaired else ():
            refused[index] = not refused[index]
        return [REFUSAL if one else "Take a pan." for one in refused]

    @contextmanager
    def with_vector():
        repaired.append(True)
        yield
        repaired.clear()

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    found = Measurement(unseen, tokenizer, config, ALONE).measure(model, with_vector, 8)
    assert found["aligned"]["refusal_rate"]["share"] == 1
    assert found["aligned"]["over_refusal"] | {"high": 0} == {
        "share": 0,
        "low": 0,
        "high": 0,
        "successes": 0,
        "count": 5,
    }
    restored, above = found["restored"], found["over_refusal_above_aligned"]
    assert (restored["successes"], restored["count"]) == (7, 8)
    assert above["share"] == pytest.approx(0.2) and above["count"] == 5
    assert above["low"] < 0.2 < above["high"]
    shown = [(one["kind"], one["after"]["label"]) for one in found["examples"]]
    assert shown[:3] == [("harmful", "refused"), ("benign", "answered"), ("benign", "refused")]
    assert len(shown) == 5
    assert {one["before"]["text"] for one in found["examples"]} == {None, "Take a pan."}
    for changes, kinds in (
        ({"unseen": replace(unseen, from_vector=frozenset({"benign"}))}, {"benign"}),
        ({"unseen": replace(unseen, from_vector=frozenset())}, set()),
        ({"config": replace(config, measure=replace(config.measure, num_examples=0))}, set()),
    ):
        given = {"unseen": unseen, "config": config} | changes
        measured = Measurement(given["unseen"], tokenizer, given["config"], ALONE)
        found = measured.measure(model, with_vector, 8)
        assert {one["kind"] for one in found.get("examples", ())} == kinds


def test_answers_in_unknown_languages_are_in_no_share_and_counted_beside_it(
    setting, tokenizer, monkeypatch
):
    model, config, unseen = setting
    monkeypatch.setattr(
        measurement,
        "answers_to_tokens",
        lambda model, tokenizer, prompts, *rest: [UNKNOWN] * len(prompts),
    )
    measured = Measurement(unseen, tokenizer, config, ALONE).measure(model, nullcontext, 8)
    after = measured["after"]
    assert "de" in measured["languages"] and "pl" not in measured["languages"]
    for name, count in (("refusal_rate", 8), ("over_refusal", 5), ("incoherent", 13)):
        found = after[name]
        assert (found["successes"], found["unjudged"], found["count"]) == (0, count, count)
    assert after["unjudged"]["successes"] == 13 and "unjudged" not in after["unjudged"]
    assert all(share["unjudged"] == share["count"] for share in after["categories"].values())


def test_token_accuracy_of_every_sample(setting, tokenizer):
    model, _, unseen = setting
    (batch,) = batches(unseen.task, 100, 0, torch.device("cpu"))
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
    right = (logits.argmax(dim=-1) == batch.input_ids.roll(-1, dims=1)).float()
    expected = [float(row[mask].mean()) for row, mask in zip(right, batch.target_mask, strict=True)]
    for size in (100, 3):
        found = measurement._token_accuracy(
            model, batches(unseen.task, size, 0, torch.device("cpu")), ALONE
        )
        assert found.tolist() == pytest.approx(expected)


def test_loss_of_accuracy_is_paired(setting, tokenizer):
    model, config, unseen = setting

    @contextmanager
    def with_vector():
        weight = model.lm_head.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.neg_()
        yield
        with torch.no_grad():
            weight.copy_(kept)

    found = Measurement(unseen, tokenizer, config, ALONE).measure(model, with_vector, 8)
    accuracy, loss = found["token_accuracy"], found["utility_loss"]
    assert loss["share"] == pytest.approx(accuracy["before"] - accuracy["after"])
    assert loss["low"] <= loss["share"] <= loss["high"] and loss["count"] == 8


def thinking(kind, **values):
    """What a model with a reasoning template is measured on, and how."""
    tokenizer = reasoning_tokenizer(kind)
    model = make_model(vocab_size=len(tokenizer))
    settings = {"num_safety_shots": 4, "num_benign_shots": 4, "num_task_shots": 4}
    config = config_of(vector="v", num_test_prompts=4, **settings | values)
    vector = make_vector(model, tokenizer)
    unseen = gather_shots(config, vector, tokenizer, None, task_dataset()).unseen
    return model, Measurement(unseen, tokenizer, config, ALONE), tokenizer


def test_a_judge_reads_the_answer_and_unfinished_reasoning_is_told(monkeypatch):
    model, measured, _ = thinking("stripped", max_reasoning_tokens=5)
    asked = []

    def answers(model, tokenizer, prompts, new_tokens, *rest):
        asked.append(new_tokens)
        said = [
            "They ask how, and I cannot help with this.</think>Here is what you do: take it.",
            f"They want it, so here is how: 1. take it.</think>{REFUSAL}",
            "I'm sorry, but I cannot help with this. Or",  # reasoning that was cut off
            "Here is how",
        ]
        return (said * len(prompts))[: len(prompts)]

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    found = measured.measure(model, nullcontext, 8)
    assert asked == [32 + 5] * 2 and found["max_reasoning_tokens"] == 5
    after = found["after"]
    assert after["refusal_rate"]["successes"] == 1 and after["refusal_rate"]["count"] == 4
    assert after["unfinished"]["successes"] == 4 and after["unfinished"]["count"] == 8
    assert after["incoherent"]["successes"] == 4


def test_thinking_is_off_where_the_template_can(monkeypatch):
    model, measured, _ = thinking("hybrid")
    seen = []

    def answers(model, tokenizer, prompts, new_tokens, *rest):
        seen.extend((tokenizer.decode(ids), new_tokens) for ids in prompts)
        return [REFUSAL] * len(prompts)

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    found = measured.measure(model, nullcontext, 8)
    assert all(text.endswith("<think>\n\n</think>\n\n") and new == 32 for text, new in seen)
    assert found["after"]["refusal_rate"]["share"] == 1
    assert found["after"]["unfinished"]["share"] == found["max_reasoning_tokens"] == 0
