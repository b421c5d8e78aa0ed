"""Whether coefficients are taken: held-out safety must improve within the budgets."""

from .objective import Losses


SHRINK_STEPS = (1.0, 0.8, 0.6, 0.4, 0.2)


def objection(before: Losses, after: Losses, budget: float) -> str:
    """What speaks against coefficients with these held-out losses; empty where nothing does.

    Args:
        before: Of the fine-tune.
        after: With the coefficients.
        budget: `search.max_utility_loss`, in nats.
    """
    if not after.safety < before.safety:
        return f"the held-out safety loss went from {before.safety:.3f} to {after.safety:.3f} nats"
    if not after.utility <= budget:
        return f"the held-out task divergence is {after.utility:.3f} nats and the budget {budget} (`search.max_utility_loss`)"
    if not after.benign <= before.benign + budget:
        return (
            f"the held-out loss on benign prompts rose from {before.benign:.3f} to {after.benign:.3f} nats, more than the "
            f"budget {budget} (`search.max_utility_loss`) allows"
        )
    return ""
