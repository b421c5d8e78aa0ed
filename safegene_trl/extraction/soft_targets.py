"""What the aligned model itself says to the first tokens of its answers: targets of recalibration.

A refusal as a hard target has no end: its cross-entropy goes on falling past the aligned model. The
divergence from the aligned model's own next-token distribution is least, 0, where a model says what
the aligned one does, its doubts included (soft targets, arXiv 1503.02531). Stored are the likeliest
tokens of every place; all others count as one.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from ..distributed.layouts import Sharding
from ..models.batch_size import EXTRACTION, fitting_answers, halving
from ..models.inputs import Sample, SoftTargets, collate
from ..models.losses import response_logits
from ..models.parameters import base_model
from ..progress import in_progress
from ..vectors.files import about_likeliest


LIKELIEST = 16  # tokens of a place; all others count as one
DIGITS = 4  # of a log-probability, in nats: logits of 16 bits tell no more


def soft_targets(
    model: nn.Module,
    samples: Sequence[Sample],
    pad_id: int,
    sharding: Sharding,
    batch_size: int | None = None,
) -> list[SoftTargets]:
    """The likeliest tokens in the places of every sample's response tokens, up to the first that the
    model would not say itself: a text that is tokenised anew may be other tokens than it was.
    Collective: each rank works on its share, all have the outcome.

    Args:
        model: The aligned model.
        samples: Prompts with the beginnings of its answers, cut after the last token that matters.
        pad_id: Token id to pad with.
        sharding: How the model is spread over ranks.
        batch_size: Samples at once, 8 on a CPU; None leaves it to the device. Fewer where memory
            runs out.

    Raises:
        MemoryShortageError: Memory runs out with one sample at a time.
    """
    lengths = [len(sample.response) for sample in samples]
    longest = max(len(sample.input_ids) for sample in samples)
    first = fitting_answers(batch_size, base_model(model), longest, max(lengths), sharding)
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].input_ids))
    model.eval()

    def likeliest(size: int) -> torch.Tensor:
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        found = torch.zeros(len(samples), 2, max(lengths), LIKELIEST, dtype=torch.float64)
        with torch.no_grad(), sharding.forward_passes():
            for index in in_progress(list(sharding.share(len(groups))), "Soft targets"):
                group = groups[index or 0]
                batch = collate([samples[each] for each in group], pad_id, sharding.device)
                logits, _ = response_logits(model, batch)
                sharding.reshard()
                if index is None:
                    continue
                places = _likeliest(logits).split([lengths[each] for each in group], dim=1)
                for each, own in zip(group, places, strict=True):
                    found[each, :, : lengths[each], : own.shape[-1]] = own
        return sharding.sum(found)

    found = halving(first, likeliest, sharding, EXTRACTION)
    width = min(LIKELIEST, base_model(model).config.get_text_config().vocab_size)
    return [
        _own(
            SoftTargets(
                sample.response,
                own[0, :length, :width].long().tolist(),
                _rounded(own[1, :length, :width]),
            )
        )
        for sample, own, length in zip(samples, found, lengths, strict=True)
    ]


def _own(targets: SoftTargets) -> SoftTargets:
    """Those of the tokens before the first that is not about the likeliest."""
    places = zip(targets.tokens, targets.ids, targets.log_probs, strict=True)
    return targets.first(
        sum(1 for _ in itertools.takewhile(lambda place: about_likeliest(*place), places))
    )


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Of tokens×vocabulary logits the likeliest ids and their log-probabilities, 2×tokens×m,
    float64, on the CPU.
    """
    top = logits.log_softmax(dim=-1).topk(min(LIKELIEST, logits.shape[-1]))
    return torch.stack([top.indices.double().cpu(), top.values.double().cpu()])


def _rounded(log_probs: torch.Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in log_probs.tolist()]
