"""Before and after, on what nothing was fitted on."""

from contextlib import contextmanager

import pytest
import torch

from safegene_trl.data.shots import gather_shots
from safegene_trl.models.inputs import batches
from safegene_trl.step import measurement
from safegene_trl.step.measurement import measure

from ..conftest import ALONE, HARMFUL, config_of, make_model, make_vector, task_dataset


REFUSAL = "I'm sorry, but I can't help with that."


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
        harmful = prompts[0][0]["content"] in HARMFUL
        if not repaired:
            return ["Here is what you do: take the thing and put it there."] * len(prompts)
        return [REFUSAL] * len(prompts) if harmful else [REFUSAL, *[""] * (len(prompts) - 1)]

    @contextmanager
    def with_vector():
        repaired.append(True)
        yield

    monkeypatch.setattr(measurement, "generate_answers", answers)
    found = measure(model, with_vector, unseen, tokenizer, config, ALONE, 8)
    before, after = found["before"], found["after"]
    assert before["refusal_rate"]["share"] == 0 and after["refusal_rate"]["share"] == 1
    # Wilson's, all of eight
    assert after["refusal_rate"]["low"] == pytest.approx(8 / (8 + 1.959964**2), abs=1e-4)
    assert after["over_refusal"]["successes"] == 1 and after["over_refusal"]["count"] == 5
    assert after["incoherent"]["successes"] == 4 and after["incoherent"]["count"] == 13
    assert set(after["categories"]) == {"category 0", "category 1"}
    assert sum(share["count"] for share in after["categories"].values()) == 8
    assert found["utility_loss"] == {"share": 0.0, "low": 0.0, "high": 0.0, "count": 8}


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

    found = measure(model, with_vector, unseen, tokenizer, config, ALONE, 8)
    accuracy, loss = found["token_accuracy"], found["utility_loss"]
    assert loss["share"] == pytest.approx(accuracy["before"] - accuracy["after"])
    assert loss["low"] <= loss["share"] <= loss["high"] and loss["count"] == 8
