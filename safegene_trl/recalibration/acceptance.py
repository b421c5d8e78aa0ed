"""Whether coefficients are taken: held-out safety must improve within the budgets."""

from ..text import told_apart
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
        was, now = told_apart(before.safety, after.safety)
        return f"the held-out safety loss went from {was} to {now} nats"
    if not after.utility <= budget:
        found = told_apart(after.utility, budget)[0]
        return f"the held-out task divergence is {found} nats and the budget {budget} (`search.max_utility_loss`)"
    if not after.benign <= before.benign + budget:
        was, now = told_apart(before.benign, after.benign)
        return (
            f"the held-out loss on benign prompts rose from {was} to {now} nats, more than the "
            f"budget {budget} (`search.max_utility_loss`) allows"
        )
    return ""
