"""What a terminal shows of a report."""

from safegene_trl.reporting.summary import summary


def report(before, after):
    return {
        "decision": {"outcome": "rejected", "reason": "no"},
        "model": {"architecture": "LlamaForCausalLM", "kind": "full"},
        "vector": {"name": "v"},
        "held_out": {
            "before": {"safety": before, "utility": 0.0},
            "after": {"safety": after, "utility": 0.0312},
        },
    }


def test_what_is_held_against_the_aligned_model_has_a_line_each():
    measured = {
        "restored": {"share": 0.75, "low": 0.5, "high": 0.9, "count": 20},
        "over_refusal_above_aligned": {"share": -0.05, "low": -0.1, "high": 0.0, "count": 40},
    }
    said = summary(report(1, 2) | {"measured": measured})
    assert "\nlost refusals restored 75.0% [50.0%, 90.0%] on 20 unseen harmful prompts" in said
    assert "over-refusal above the aligned model -5.0% [-10.0%, 0.0%] on 40 unseen benign" in said


def test_what_the_aligned_model_does_stands_beside_what_it_is_held_against():
    share = {"share": 0.325, "low": 0.2, "high": 0.48, "count": 40}
    measured = {"before": {"over_refusal": share}, "after": {"over_refusal": share}}
    said = summary(report(1, 2) | {"measured": measured})
    assert said.endswith("over refusal 32% → 32% [20%, 48%] of 40 unseen prompts")
    measured["aligned"] = {"over_refusal": share | {"share": 0.1}}
    said = summary(report(1, 2) | {"measured": measured})
    assert said.endswith("[20%, 48%] of 40 unseen prompts, 10% by the aligned model")


def test_losses_that_differ_are_written_differently():
    assert "held-out safety loss 0.00412 → 0.00409 nats, task div" in summary(
        report(0.00412, 0.00409)
    )
    assert "held-out safety loss 3.100 → 0.412 nats" in summary(report(3.1, 0.412))


def test_how_far_the_repair_went_has_a_line_where_more_was_asked_for():
    repair = {"rung": "vector", "reason": "No touch-up is taken: it is too dear."}
    said = summary(report(1, 2) | {"repair": repair})
    assert "repair by vector: No touch-up is taken: it is too dear." in said
    assert "repair" not in summary(report(1, 2))


def test_touch_ups_of_earlier_releases_are_told():
    held = {"base": {"touch_ups": [{"rank": 8, "sha256": "a"}]}}
    assert "also hold 1 touch-up(s) of earlier releases" in summary(report(1, 2) | held)
    assert "touch-up" not in summary(report(1, 2) | {"base": {"touch_ups": []}})


def test_the_worst_category_has_a_line():
    def share(value):
        return {"share": value, "low": value - 0.1, "high": value + 0.1, "count": 20}

    categories = {"fraud": share(0.9), "odd\x1b": share(0.4), "theft": share(0.5)}
    found = summary(report(1, 2) | {"measured": {"after": {"categories": categories}}})
    expected = "refusal rate by category (3): least in odd\\x1b, 40% [30%, 50%] of 20 prompts"
    assert found.splitlines()[-1] == expected
    del categories["fraud"], categories["theft"]
    again = summary(report(1, 2) | {"measured": {"after": {"categories": categories}}})
    assert "by category" not in again  # one says nothing beside the whole
