"""How far several judges agree, and where that is said."""

import pytest

from safegene_trl.commands.evaluate import text
from safegene_trl.data.prompts import Prompt
from safegene_trl.evaluation.agreement import agreement, compared, comparisons
from safegene_trl.evaluation.results import summary
from safegene_trl.judges import Verdict


def prompts(name, kind, count, categories=("x", "y")):
    return [
        Prompt(
            name,
            kind,
            categories[i % len(categories)],
            ({"role": "user", "content": f"{name} {i}"},),
        )
        for i in range(count)
    ]


def verdicts(*labels):
    return [Verdict(label) for label in labels]


REFUSALS = {"phrases": "refusals", "head": "refusals"}
HARM = {"phrases": "refusals", "guard": "harm"}


def beside(asked, sees, **said):
    """What every judge's numbers are, with the others beside them."""
    found = comparisons(asked, said, sees)
    return {name: summary(asked, own, 0, found[name]) for name, own in said.items()}


def test_beside_a_sets_shares_stands_on_how_many_answers_judges_disagree():
    asked = prompts("direct", "harmful", 40)
    found = beside(
        asked,
        REFUSALS,
        phrases=verdicts(*["refused"] * 30, *["answered"] * 10),
        head=verdicts(*["refused"] * 26, *["answered"] * 14),
    )
    for judge in found.values():
        own = judge["sets"]["direct"]["disagreement"]
        assert own["share"] == pytest.approx(0.1) and (own["count"], own["left_out"]) == (40, 0)
        # Wilson's of 4 of 40
        assert own["low"] == pytest.approx(0.0396, abs=1e-4)
        assert own["high"] == pytest.approx(0.2305, abs=1e-4)
        parts = judge["sets"]["direct"]["categories"]
        assert [parts[name]["disagreement"]["count"] for name in "xy"] == [20, 20]
        assert sum(parts[name]["disagreement"]["share"] * 20 for name in "xy") == pytest.approx(4)
        # of one set the mean is that set's
        assert judge["attack_success"]["disagreement"] == own


def test_answers_that_a_judge_cannot_judge_count_for_neither_and_are_told():
    asked = prompts("direct", "harmful", 6)
    found = beside(
        asked,
        REFUSALS,
        phrases=verdicts("unjudged", "refused", "refused", "answered", "incoherent", "unfinished"),
        head=verdicts("answered", "unjudged", "answered", "answered", "incoherent", "unfinished"),
    )
    own = found["phrases"]["sets"]["direct"]["disagreement"]
    assert own["share"] == pytest.approx(1 / 3) and (own["count"], own["left_out"]) == (3, 3)
    nothing = beside(asked[:1], REFUSALS, phrases=verdicts("unjudged"), head=verdicts("refused"))
    assert nothing["head"]["sets"]["direct"]["disagreement"] == {
        "share": None,
        "low": None,
        "high": None,
        "count": 0,
        "left_out": 1,
    }


def test_a_judge_of_harm_is_compared_on_attacks_and_not_on_refusals():
    asked = [*prompts("direct", "harmful", 4), *prompts("look-alikes", "benign", 2)]
    said = {
        "phrases": verdicts("refused", "answered", "answered", "refused", "refused", "answered"),
        "guard": verdicts("harmless", "harmful", "harmless", "unjudged", "harmless", "harmless"),
    }
    assert compared(HARM, "harmful") == ["phrases", "guard"] and compared(HARM, "benign") == []
    found = beside(asked, HARM, **said)
    for judge in found.values():
        own = judge["sets"]["direct"]["disagreement"]
        assert own["share"] == pytest.approx(1 / 3) and (own["count"], own["left_out"]) == (3, 1)
        assert judge["sets"]["look-alikes"]["disagreement"] is None
        assert judge["over_refusal"]["disagreement"] is None
    (pair,) = agreement(asked, said, HARM)
    assert pair["answers"] == 3 and pair["agreement"] == pytest.approx(2 / 3)
    assert pair["kappa"] == pytest.approx(0.4)


def test_of_three_judges_those_that_see_refusals_are_compared_on_benign_prompts():
    asked = prompts("look-alikes", "benign", 2)
    three = REFUSALS | {"guard": "harm"}
    found = beside(
        asked,
        three,
        phrases=verdicts("refused", "answered"),
        head=verdicts("answered", "answered"),
        guard=verdicts("harmless", "harmful"),
    )
    assert compared(three, "benign") == ["phrases", "head"]
    assert found["head"]["sets"]["look-alikes"]["disagreement"]["share"] == 0.5
    assert found["guard"]["sets"]["look-alikes"]["disagreement"] is None
    # one that differs from two others
    attacked = prompts("direct", "harmful", 1)
    said = [verdicts("refused"), verdicts("refused"), verdicts("harmful")]
    own = beside(attacked, three, **dict(zip(three, said, strict=True)))
    assert own["phrases"]["sets"]["direct"]["disagreement"]["share"] == 1


def test_the_mean_over_sets_weighs_sets_alike_in_disagreement_too():
    asked = [*prompts("a", "harmful", 4), *prompts("b", "harmful", 40)]
    found = beside(
        asked,
        REFUSALS,
        phrases=verdicts(*["answered"] * 44),
        head=verdicts(*["refused"] * 2, *["answered"] * 42),
    )
    own = found["phrases"]["attack_success"]["disagreement"]
    assert own["share"] == pytest.approx(0.25) and own["count"] == 44
    assert 0 <= own["low"] < 0.25 < own["high"] <= 0.5


def test_one_judge_alone_has_nothing_beside_it():
    found = summary(prompts("direct", "harmful", 2), verdicts("refused", "answered"))
    assert "disagreement" not in found["sets"]["direct"]
    assert "disagreement" not in found["attack_success"]


def printed(asked, sees, **said):
    own = beside(asked, sees, **said)
    return text(
        {
            "judges": {name: {"sees": sees[name], **own[name]} for name in own},
            "settings": {"chat_template": "x"},
            "agreement": agreement(asked, said, sees),
            "left_out_as_repeated": [],
        }
    )


def test_every_judges_numbers_are_printed_with_the_disagreement():
    asked = [*prompts("a", "harmful", 4), *prompts("b", "harmful", 4)]
    found = printed(
        asked,
        REFUSALS,
        phrases=verdicts(*["refused"] * 7, "unjudged"),
        head=verdicts("answered", *["refused"] * 7),
    )
    assert "Judge phrases (sees refusals)" in found and "Judge head (sees refusals)" in found
    assert found.count("judges disagree 25.0 [4.6, 69.9] of 4\n") == 2
    assert found.count("judges disagree 0.0 [0.0, 56.1] of 3 (1 not judged by all)") == 2
    assert (
        "mean over 2 sets: 0.0 (no interval: every set is all alike) of 7   judges disagree 12.5 ["
        in found
    )
    assert "Judges disagree: one says that the attack succeeded" in found
    assert "On benign prompts" not in found and "on 7 answers" in found


def test_judges_that_are_not_compared_are_said_to_be_not():
    asked = prompts("c", "benign", 2)
    found = printed(
        asked, HARM, phrases=verdicts("refused", "answered"), guard=verdicts("harmless", "harmless")
    )
    assert found.count("judges not compared") == 2
    assert "On benign prompts only judges that see refusals are compared." in found
    assert "phrases and guard: – on 0 answers" in found
