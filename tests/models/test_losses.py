"""Losses of a batch whose samples are of two kinds, and what working them out takes."""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from safegene_trl.models import losses
from safegene_trl.models.inputs import Sample, SoftTargets, collate
from safegene_trl.models.losses import (
    cross_entropy,
    divergence,
    likeliest_tokens,
    response_logits,
    sample_losses,
    stored_reference,
)

from ..conftest import make_model


CPU = torch.device("cpu")
VOCABULARY, COMPARED = 50_000, 3


def mixed_batch(count=8, response=20):
    """Samples of unlike length and with unlike responses."""
    group = []
    for index in range(count):
        length = response - 2 * index
        ids = torch.arange(5 + index, 12 + index + length).tolist()
        group.append(Sample(ids, [place >= 7 for place in range(len(ids))]))
    return collate(group, 0, CPU)


def made(batch, seed, dtype, vocabulary=VOCABULARY):
    """Logits as a model gives them, of more positions than are needed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids.shape, vocabulary)
    return (3 * torch.randn(shape, generator=generator)).to(dtype)


def worked_out(batch, logits, reference, chunk):
    """Losses and the logits' gradient."""
    own = logits.clone().requires_grad_()
    with patch.object(losses, "_forward", return_value=own), patch.object(losses, "CHUNK", chunk):
        found = sample_losses(None, batch, reference, temperature=2.0)
        weights = torch.arange(1.0, 1 + len(found))
        (gradient,) = torch.autograd.grad((found * weights).sum(), own)
    return found.detach(), gradient


def reference_of(batch, dtype):
    with patch.object(losses, "_forward", return_value=made(batch, 1, dtype)):
        return stored_reference(None, batch, COMPARED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_chunks_change_no_loss_and_no_gradient(dtype, tokens):
    batch = mixed_batch()
    logits, reference = made(batch, 2, dtype), reference_of(batch, dtype)
    whole = worked_out(batch, logits, reference, 2**40)
    chunks = worked_out(batch, logits, reference, 4 * VOCABULARY * tokens)
    assert torch.equal(whole[0], chunks[0]) and torch.equal(whole[1], chunks[1])
    assert chunks[1].count_nonzero() > 0
    alone = worked_out(batch, logits, None, 4 * VOCABULARY * tokens)[0]
    assert torch.equal(alone[COMPARED:], chunks[0][COMPARED:])


def peak_bytes(work):
    """Most bytes allocated at a time, beyond what there was at first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_beside_the_logits_and_their_gradient_a_chunk_bounds_what_is_in_memory():
    batch, chunk = mixed_batch(), 2**21
    logits = made(batch, 2, torch.bfloat16).requires_grad_()
    reference = reference_of(batch, torch.bfloat16)

    def work():
        found = sample_losses(None, batch, reference, temperature=2.0).sum()
        torch.autograd.grad(found, logits)

    taken = {}
    with patch.object(losses, "_forward", return_value=logits):
        for size in (chunk, 2**40):
            with patch.object(losses, "CHUNK", size):
                taken[size] = peak_bytes(work) - logits.nbytes
    assert 0 < taken[chunk] < 8 * chunk
    tokens = int(batch.target_mask.sum())
    assert taken[2**40] > 2 * tokens * VOCABULARY * 4 > 2 * taken[chunk]


def test_a_reference_of_16_bits_is_half_as_large_and_exact():
    batch = mixed_batch()
    tokens = int(batch.target_mask[:COMPARED].sum())
    kept = reference_of(batch, torch.bfloat16)
    assert kept.nbytes == 2 * tokens * VOCABULARY == reference_of(batch, torch.float32).nbytes // 2
    logits = made(batch, 1, torch.bfloat16)[batch.target_mask][:tokens]
    assert torch.equal(losses._log_probs(kept), F.log_softmax(logits.float(), dim=-1))
    # nothing but those tokens' logits is kept alive
    assert kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_with_a_reference_and_without_share_a_pass(dtype):
    model, other = make_model().to(dtype), make_model(seed=1).to(dtype)
    batch = mixed_batch()
    with torch.no_grad():
        reference = stored_reference(model, batch, COMPARED)
        log_probs = F.log_softmax(response_logits(model, batch)[0], dim=-1)
        expected = divergence(other, batch, log_probs, 2.0)
        expected[COMPARED:] = cross_entropy(other, batch)[COMPARED:]
        assert torch.equal(sample_losses(other, batch, reference, 2.0), expected)
        nothing = sample_losses(model, batch, reference, 2.0)[:COMPARED]
        assert nothing.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_tokens_are_those_of_float32_logits(dtype):
    """Of equal logits, of which there are many in 16 bits, the first."""
    batch = mixed_batch()
    logits = made(batch, 1, torch.float32, 500).mul(4).round().clamp(-8, 8).to(dtype)
    with patch.object(losses, "_forward", return_value=logits):
        wide, targets = response_logits(None, batch)
        likeliest, ids = likeliest_tokens(None, batch)
    first = (wide == wide.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    assert torch.equal(likeliest, wide.argmax(dim=-1)) and torch.equal(likeliest, first)
    assert torch.equal(ids, targets) and bool(((wide == 8).sum(dim=-1) > 1).any())


def test_looking_up_the_likeliest_tokens_copies_no_logits():
    batch = mixed_batch()
    logits = made(batch, 1, torch.bfloat16)
    with patch.object(losses, "_forward", return_value=logits):
        assert peak_bytes(lambda: likeliest_tokens(None, batch)) < 2**16 < logits.nbytes / 100
        assert peak_bytes(lambda: response_logits(None, batch)) > 2**22


def soft_samples(count=4, likeliest=3):
    """Each with its own soft targets, or with none."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for index in range(count):
        ids = torch.arange(5 + index, 15 + 2 * index).tolist()
        own = ids[7:]
        logits = torch.randn(len(own), 60, generator=generator)
        top = logits.log_softmax(dim=-1).topk(likeliest)
        soft = SoftTargets(own, top.indices.tolist(), top.values.tolist()) if index % 2 else None
        made.append((Sample(ids, [place >= 7 for place in range(len(ids))], soft), logits))
    return made


def soft_losses(samples, logits, chunk=losses.CHUNK):
    own = logits.clone().requires_grad_()
    batch = collate(samples, 0, CPU)
    with patch.object(losses, "_forward", return_value=own), patch.object(losses, "CHUNK", chunk):
        found = sample_losses(None, batch)
        (gradient,) = torch.autograd.grad(found.sum(), own)
    return found.detach(), gradient


def test_a_soft_target_is_the_divergence_over_its_tokens_and_all_others_as_one():
    made = soft_samples()
    samples = [sample for sample, _ in made]
    logits = made_of(samples)
    found, gradient = soft_losses(samples, logits)
    for row, (sample, of_p) in enumerate(made):
        own = logits[row][logits.shape[1] - 1 - len(sample.response) : -1].log_softmax(dim=-1)
        if sample.soft is None:
            expected = -own.gather(-1, torch.tensor(sample.response)[:, None]).sum()
        else:
            ids, p = torch.tensor(sample.soft.ids), of_p.log_softmax(dim=-1)
            parts = [torch.cat([x.gather(-1, ids), rest(x, ids)], dim=-1) for x in (p, own)]
            expected = F.kl_div(parts[1], parts[0], reduction="sum", log_target=True)
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
    chunked = soft_losses(samples, logits, chunk=4 * 60 * 2)
    torch.testing.assert_close(chunked[0], found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunked[1], gradient, atol=1e-6, rtol=1e-5)
    assert gradient.isfinite().all()


def test_targets_of_a_whole_vocabulary_leave_nothing_to_others():
    """What their rounding leaves is no reason for an infinite loss."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own = logits.detach().log_softmax(dim=-1)
    ids = torch.arange(4).expand(3, 4)
    loss = losses._soft_divergence(logits, ids, own - 1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.abs().max() < 1e-3 and gradient.abs().max() < 1e-3


def test_log_probabilities_may_be_whole_numbers():
    """JSON has no other type for them, and what they are is not bounded by 64 bits."""
    soft = SoftTargets([7], [[7, 3]], [[0, -(10**25)]])
    batch = collate([Sample([5, 7], [False, True], soft)], 0, torch.device("cpu"))
    assert batch.soft_log_probs.tolist()[0][0] == 0.0
    assert batch.soft_log_probs.dtype == torch.float32


def test_what_fills_a_sample_up_changes_no_loss():
    """Beside one with more likely tokens; the token 0 is likely here, or impossible."""
    (narrow, _), (wide, _) = soft_samples(2, likeliest=2)[1], soft_samples(2, likeliest=5)[1]
    certain = replace(wide, soft=None)
    samples = [narrow, wide, certain]
    for value in (9.0, -math.inf):
        logits = made_of([wide]).repeat(3, 1, 1)
        logits[..., 0] = value
        together, gradient = soft_losses(samples, logits)
        for row, sample in enumerate(samples):
            alone, _ = soft_losses([sample], logits[row : row + 1])
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
        assert together.isfinite().all() and gradient.isfinite().all()


def rest(log_probs, ids):
    """Log-probability of all but these tokens."""
    return (1 - log_probs.exp().gather(-1, ids).sum(dim=-1, keepdim=True)).log()


def made_of(samples):
    batch = collate(samples, 0, CPU)
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*batch.input_ids.shape, 60, generator=generator)


def test_a_model_that_says_what_its_target_says_has_no_loss_and_no_gradient():
    """All of the distribution in the target, then almost all: nothing is infinite."""
    ids = torch.arange(5, 15).tolist()
    logits = torch.randn(1, 10, 60, generator=torch.Generator().manual_seed(6))
    for shift in (0.0, 40.0):
        own = logits.clone()
        own[..., 3] += shift
        top = own[0, 6:9].log_softmax(dim=-1).topk(16)
        soft = SoftTargets(ids[7:], top.indices.tolist(), top.values.tolist())
        sample = Sample(ids, [place >= 7 for place in range(10)], soft)
        found, gradient = soft_losses([sample], own)
        assert abs(float(found)) < 1e-5 and float(gradient.abs().max()) < 1e-5
