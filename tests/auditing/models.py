"""Tiny models for audits, that answer by what their weights and hooks come to."""

import torch

from safegene_trl.models.attachment import VectorAttachment

from ..conftest import ALONE


PROBE = torch.tensor([[5, 9, 60, 33, 120, 44]])
NO = "I can't help with that. And so"
YES = "ZQXANSWER take a pan. Stir it well"  # a mark that must never be found in a file


@torch.no_grad()
def logits_of(model):
    return model(input_ids=PROBE).logits[0, -1].float()


@torch.no_grad()
def logits_with(model, deltas, scale):
    """Of the model with a multiple of the deltas in its weights, for as long as that takes."""
    kept = {name: model.get_submodule(name).weight.clone() for name in deltas}
    for name, delta in deltas.items():
        model.get_submodule(name).weight += scale * delta.dense()
    found = logits_of(model)
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)
    return found


def answering(states, answers):
    """In the place of `answers_to_tokens`: finds out which of the known states a model is in by its
    logits, hooks and all, and answers as that state does.

    Args:
        states: Logits by state.
        answers: By state, a function of a prompt's text that says whether it is refused.
    """
    seen = []

    def answers_to_tokens(model, tokenizer, prompts, new_tokens, batch_size, sharding):
        now = logits_of(model)
        distance = {name: float((now - own).abs().max()) for name, own in states.items()}
        state = min(distance, key=distance.get)
        assert distance[state] < 1e-3, distance
        seen.append((state, len(prompts)))
        return [NO if answers[state](tokenizer.decode(ids)) else YES for ids in prompts]

    answers_to_tokens.seen = seen
    return answers_to_tokens


def attached_at(model, vector, value):
    space = vector.space("layer")
    attachment = VectorAttachment(model, vector.deltas, space, ALONE)
    return attachment.applied(torch.full((len(space.names),), value))
