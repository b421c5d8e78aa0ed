"""What `safegene audit` takes."""

import json
from collections.abc import Sequence

from ..auditing.asking import Looked
from ..auditing.plan import PlannedAudit
from ..checkpoints.loading import resolve_dtype
from ..models.batch_size import ON_CPU
from ..models.parameters import base_model
from ..vectors.audit_file import ROLES
from .cost import Cost, Launch
from .planned_run import PlannedRun
from .probe import Probe


BYTES_OF_A_CELL = 3_600  # in `audit.json` and on the page, with its share of what is there once
_ALONE = Launch()


def estimate_audit(plan: PlannedAudit, models: Sequence[Looked]) -> dict[str, Cost]:
    """Costs of the answers of the aligned model and, where there is one, of the fine-tune, each with
    and without the vector, and of what is written.

    All answers are counted, also those whose labels an earlier run has left, and no judge but
    `refusal_phrases`, which takes no time beside them. A quantised model counts as the 16-bit one
    that it stands for.

    Args:
        plan: The audit.
        models: From `look_at_models`.
    """
    names = ("aligned", "fine_tune")
    costs = {name: _answers(plan, each) for name, each in zip(names, models, strict=False)}
    host = max(cost.memory for cost in costs.values())
    return costs | {"save": Cost(0.0, host, _written_bytes(plan, models))}


def _answers(plan: PlannedAudit, looked: Looked) -> Cost:
    """One model's answers in each of its variants; in two that are the same it is asked once."""
    asking, vector = looked.asking, plan.vector
    dtype = resolve_dtype(asking.dtype, looked.name, asking.model_revision)
    probe = Probe(base_model(looked.shape), dtype)  # a LoRA is folded into the weights
    factors = [tensor for delta in vector.deltas.values() for tensor in (delta.a, delta.b)]
    stored = sum(tensor.nbytes for tensor in factors)
    deltas = probe.deltas(vector.deltas, vector.rank)
    run = PlannedRun.of(probe, looked.tokenizer, _ALONE, deltas, stored)
    prompts = [list(prompt.messages) for prompt in plan.found.prompts]
    most = asking.max_new_tokens + asking.answering(looked.tokenizer).max_reasoning_tokens
    seconds, memory = 0.0, 0
    for with_vector in _ways(looked):
        taken, peak = run.answers([prompts], most, asking.batch_size or ON_CPU, with_vector)
        seconds, memory = seconds + taken, max(memory, peak)
    return run.cost(seconds, memory)


def _ways(looked: Looked) -> list[bool]:
    """Of each variant that is asked, whether it answers with hooks of the vector."""
    records = {json.dumps(each.record, sort_keys=True) for each in looked.variants.values()}
    return [record != "{}" for record in sorted(records)]


def _written_bytes(plan: PlannedAudit, models: Sequence[Looked]) -> int:
    """Of the labels, of `audit.json` and its page."""
    labels = dict.fromkeys(plan.config.judges, "answered")
    total = 0
    for item in plan.found.items:
        line = json.dumps({"run": "0" * 64, "key": item.prompt.key, "labels": labels})
        row = {"key": "0" * 16, "where": item.place.named, **dict.fromkeys(ROLES, "answered")}
        total += sum(len(_ways(each)) for each in models) * (len(line) + 1)
        total += len(json.dumps([row], indent=2)) + 4 * (len(row) + len(item.place.named))
    cells = {pair for item in plan.found.items for pair in item.place.named.items()}
    places = [item.place for item in plan.found.items if plan.config.crossed]
    crossed = {(place.category, place.form) for place in places if place.category}
    return total + BYTES_OF_A_CELL * (len(cells) + len(crossed))
