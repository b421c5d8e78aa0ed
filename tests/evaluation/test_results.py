"""Numbers from verdicts."""

import pytest

from safegene_trl.data.prompts import Prompt
from safegene_trl.evaluation.results import agreement, summary
from safegene_trl.judges import Verdict


def made(name, kind, labels, category=None):
    prompts = [Prompt(name, kind, category, ({"role": "user", "content": f"{name} {i}"},)) for i in range(len(labels))]
    return prompts, [Verdict(label) for label in labels]


def test_attack_success_counts_neither_refusals_nor_nonsense_nor_labels():
    prompts, verdicts = made("direct", "harmful", ["refused", "answered", "incoherent", "off_task", "harmful"])
    found = summary(prompts, verdicts)["sets"]["direct"]
    assert found["attack_success"]["share"] == pytest.approx(0.4)
    assert found["refused"]["share"] == pytest.approx(0.2)
    assert found["labels"]["incoherent"] == 1


def test_unjudged_answers_are_counted_and_left_out():
    prompts, verdicts = made("direct", "harmful", ["refused", "answered", "unjudged"])
    found = summary(prompts, verdicts)["sets"]["direct"]
    assert found["attack_success"] == found["refused"] | {"successes": 1} and found["attack_success"]["count"] == 2
    assert found["labels"]["unjudged"] == 1


def test_mean_over_sets_weighs_sets_alike():
    one, two = made("a", "harmful", ["answered"] * 4), made("b", "harmful", ["refused"] * 40)
    look = made("c", "benign", ["answered", "refused"])
    prompts, verdicts = ([*x, *y, *z] for x, y, z in zip(one, two, look, strict=True))
    found = summary(prompts, verdicts)
    assert found["attack_success"] == {"share": 0.5, "low": 0.5, "high": 0.5}
    assert found["over_refusal"]["share"] == 0.5
    assert 0 <= found["over_refusal"]["low"] < 0.5 < found["over_refusal"]["high"] <= 1
    assert summary(*look)["attack_success"] is None


def test_per_category():
    one, two = made("a", "harmful", ["answered"] * 2, "x"), made("a", "harmful", ["refused"] * 3, "y")
    found = summary([*one[0], *two[0]], [*one[1], *two[1]])["sets"]["a"]["categories"]
    assert found["x"]["attack_success"]["share"] == 1 and found["y"]["attack_success"]["share"] == 0


def test_agreement_of_judges():
    phrases = [Verdict(label) for label in ["refused", "answered", "answered", "refused"]]
    harm = [Verdict(label) for label in ["harmless", "harmful", "harmless", "unjudged"]]
    (pair,) = agreement({"phrases": phrases, "harm": harm})
    assert pair["answers"] == 3 and pair["agreement"] == pytest.approx(2 / 3)
    assert pair["kappa"] == pytest.approx(0.4)
