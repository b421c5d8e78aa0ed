"""How the objective puts samples through the model: few passes, little padding, the same numbers."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.models.attachment import frozen_for_calibration
from safegene_trl.models.inputs import Sample, SoftTargets, batches
from safegene_trl.models.losses import cross_entropy, divergence, response_logits
from safegene_trl.recalibration import objective
from safegene_trl.recalibration.objective import TERMS, Objective, Passes, evaluate_objective

from ..conftest import ALONE, attachment_of, config_of, make_deltas, make_model


def drawn(count, seed, prompts, responses):
    """Samples with so many tokens in prompt and response, from the first to below the second."""
    generator, made = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, response = (int(generator.integers(*span)) for span in (prompts, responses))
        ids = generator.integers(5, 300, prompt + response).tolist()
        made.append(Sample(ids, [place >= prompt for place in range(len(ids))]))
    return made


def data_of(count, prompts, responses):
    """So many samples of each kind; refusals and benign answers are read for few tokens."""
    task = drawn(count, 1, prompts, responses)
    harmful, benign = (drawn(count, seed, (15, 45), (6, 9)) for seed in (2, 3))
    return CalibrationSet(*(Split(samples, samples[:1]) for samples in (harmful, task, benign)))


def evaluated(model, data, size, point):
    """Losses and gradients by term, and the passes of one evaluation: their tokens, and positions of
    the head."""
    deltas = make_deltas(model)
    config = config_of(vector="v", utility_temperature=2.0)
    passes = []

    def note(module, args, given):
        passes.append((given["input_ids"], given["logits_to_keep"]))

    with frozen_for_calibration(model):
        fit = Objective(model, data, "fit", config, Passes(0, size), ALONE)
        with model.register_forward_pre_hook(note, with_kwargs=True):
            attach = attachment_of(model, deltas).applied
            losses, terms = fit.gradients(model, attach, point)
    return losses, terms, passes


TASKS = {"labels": ((30, 80), (2, 4)), "answers": ((20, 100), (20, 65))}


def positions(model, data, size):
    """Of one evaluation: passes, and positions in layers and head, where each kind has its own
    batches.
    """
    splits = (data.task, data.harmful, data.benign)
    alike = [b for split in splits for b in batches(split.fit, size, 0, torch.device("cpu"))]
    return len(alike), sum(len(b.input_ids) * (b.input_ids.shape[1] + b.kept) for b in alike)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("count", "size"), [(24, 8), (24, 64), (5, 8), (9, 8)])
def test_an_evaluation_on_a_gpu_takes_as_few_passes_as_can_be(count, size, task, monkeypatch):
    data = data_of(count, *TASKS[task])
    monkeypatch.setattr(objective, "has_own_memory", lambda device: True)
    _, _, passes = evaluated(make_model(), data, size, np.array([0.5, 0.3]))
    assert len(passes) == math.ceil(3 * count / size)
    assert sum(len(ids) for ids, *_ in passes) == 3 * count
    assert max(len(ids) for ids, *_ in passes) <= size


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [24, 18, 9, 5])
def test_an_evaluation_on_a_cpu_costs_no_more_than_with_batches_of_one_kind(count, task):
    data, model = data_of(count, *TASKS[task]), make_model()
    _, _, passes = evaluated(model, data, 8, np.array([0.5, 0.3]))
    alike, most = positions(model, data, 8)
    found = sum(len(ids) * (ids.shape[1] + kept) for ids, kept in passes)
    cost = objective.PASS_COST_ON_CPU
    assert found + cost * len(passes) <= most + cost * alike and found <= 1.1 * most


@pytest.mark.parametrize("size", [3, 8, 64])
def test_batches_of_all_kinds_give_what_each_sample_gives_alone(size):
    data, model, point = data_of(5, *TASKS["answers"]), make_model(), np.array([0.5, 0.3])
    losses, terms, _ = evaluated(model, data, size, point)
    attach = attachment_of(model, make_deltas(model)).applied
    for term, split in zip(TERMS, (data.task, data.harmful, data.benign), strict=True):
        values, gradients = [], []
        for sample in sorted(split.fit, key=lambda sample: len(sample.input_ids)):
            (batch,) = batches([sample], 1, 0, torch.device("cpu"))
            with torch.no_grad():
                before = response_logits(model, batch)[0].log_softmax(dim=-1)
            coefficients = torch.tensor(point, dtype=torch.float32).requires_grad_()
            with frozen_for_calibration(model), attach(coefficients):
                value = (
                    divergence(model, batch, before, 2.0)
                    if term == "utility"
                    else cross_entropy(model, batch)
                )
                gradients.append(torch.autograd.grad(value.sum(), coefficients)[0].numpy())
            values.append(value.item())
        tokens = sum(sum(sample.is_response) for sample in split.fit)
        assert terms[term].losses == pytest.approx(values, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(terms[term].gradients, gradients, rtol=1e-4, atol=1e-5)
        assert losses.to_dict()[term] == pytest.approx(sum(values) / tokens, rel=1e-6, abs=1e-7)


def test_a_batch_with_no_task_sample_needs_no_reference():
    data = data_of(8, *TASKS["labels"])
    model = make_model()
    fit = Objective(model, data, "fit", config_of(vector="v"), Passes(0, 8), ALONE)
    assert [job.compared for job in fit.jobs] == [8, 0, 0] and set(fit.reference) == {0}
    assert len(inspect.signature(Objective).parameters) <= 7


def soft(samples, seed):
    """The samples with soft targets, of distributions drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for sample in samples:
        logits = torch.randn(len(sample.response), 320, generator=generator)
        top = logits.log_softmax(dim=-1).topk(4)
        targets = SoftTargets(sample.response, top.indices.tolist(), top.values.tolist())
        made.append(replace(sample, soft=targets))
    return made


def test_a_divergence_enters_the_matrix_as_the_square_of_a_residual():
    """Its rows are the gradients over `√(2 k_i)`; those of a cross-entropy, the gradients."""
    model, deltas = make_model(), make_deltas(make_model())
    data = data_of(4, (20, 40), (5, 9))
    harmful = Split(soft(data.harmful.fit, 1), data.harmful.held_out)
    data = replace(data, harmful=harmful)
    config = config_of(vector="v", utility_temperature=2.0, benign_weight=0.7, utility_weight=1.3)
    point = np.array([0.5, 0.3])
    with frozen_for_calibration(model):
        fit = Objective(model, data, "fit", config, Passes(0, 8), ALONE)
        attach = attachment_of(model, deltas).applied
        losses, terms = fit.gradients(model, attach, point)
        value, _, gradient, rows = evaluate_objective(model, fit, attach, point, config)
    assert losses.safety > 0 and list(terms["safety"].divergences) == [True] * 4
    assert not terms["benign"].divergences.any() and terms["utility"].divergences.all()
    expected, total = [], np.zeros(2)
    for term, weight in (("utility", 1.3), ("safety", 1.0), ("benign", 0.7)):
        own = terms[term]
        scale = np.ones(4) if term == "benign" else np.sqrt(2 * own.losses)
        expected.append(np.sqrt(weight * own.weight) * own.gradients / scale[:, None])
        total += weight * own.weight * own.gradients.sum(axis=0)
    np.testing.assert_allclose(rows, np.concatenate(expected), rtol=1e-6)
    np.testing.assert_allclose(gradient, total, rtol=1e-6)
    named = {"safety": 1.0, "benign": 0.7, "utility": 1.3}
    assert value == pytest.approx(sum(w * getattr(losses, t) for t, w in named.items()))
