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


def test_losses_that_differ_are_written_differently():
    assert "held-out safety loss 0.00412 → 0.00409 nats, task div" in summary(
        report(0.00412, 0.00409)
    )
    assert "held-out safety loss 3.100 → 0.412 nats" in summary(report(3.1, 0.412))
