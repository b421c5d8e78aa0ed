"""A delta by category, on inputs in which each category has a direction of its own."""

import pytest
import torch

from safegene_trl.extraction.category_split import Reading, split, told_apart, whole
from safegene_trl.models.low_rank import LowRankDelta


CATEGORIES, PROMPTS, RANK, WIDTH = 4, 12, 3, 48
CLASSES = torch.arange(CATEGORIES + 1).repeat_interleave(PROMPTS)


@pytest.fixture
def delta():
    generator = torch.Generator().manual_seed(1)
    return LowRankDelta(
        torch.randn(RANK, WIDTH, generator=generator), torch.randn(20, RANK, generator=generator)
    )


def planted(noise=0.03, seed=0):
    """States that all prompts share a direction of, harmful ones another, and every category one."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, CATEGORIES + 2, generator=generator)).Q.T
    states = noise * torch.randn(len(CLASSES), WIDTH, generator=generator) + directions[-1]
    for category in range(CATEGORIES):
        states[category == CLASSES] += directions[category] + 2 * directions[-2]
    return states


def components(delta):
    """The shared one and those of the categories, dense."""
    parts = [slice(0, RANK), *(slice(RANK + c, RANK + c + 1) for c in range(CATEGORIES))]
    return [delta.b[:, part] @ delta.a[part] for part in parts]


def test_with_all_at_1_they_are_the_whole_delta(delta):
    for states in (planted(), torch.randn(len(CLASSES), WIDTH), torch.zeros(len(CLASSES), WIDTH)):
        made = split(delta, Reading.of(states, CLASSES, CATEGORIES)).delta
        assert made.a.shape == (RANK + CATEGORIES, WIDTH) and made.a.dtype == torch.float32
        torch.testing.assert_close(sum(components(made)), delta.dense(), atol=1e-5, rtol=1e-4)


def test_a_component_acts_on_its_own_category_and_no_other_prompts(delta):
    states = planted()
    made = split(delta, Reading.of(states, CLASSES, CATEGORIES)).delta
    fresh = _again(states)  # prompts that nothing was fitted on
    for category, component in enumerate(components(made)[1:]):
        sizes = (fresh @ component.T).norm(dim=1)
        own, others = sizes[category == CLASSES], sizes[category != CLASSES]
        assert others.mean() < 0.1 * own.mean() and others.max() < own.min()


def _again(states):
    """Other prompts of the same classes: their means, and other noise."""
    means = torch.stack([states[each == CLASSES].mean(dim=0) for each in range(CATEGORIES + 1)])
    noise = 0.03 * torch.randn(states.shape, generator=torch.Generator().manual_seed(9))
    return means[CLASSES] + noise


def test_what_the_categories_share_is_in_the_shared_component_alone(delta):
    states = planted()
    shared, *own = components(split(delta, Reading.of(states, CLASSES, CATEGORIES)).delta)
    means = torch.stack([states[each == CLASSES].mean(dim=0) for each in range(CATEGORIES + 1)])
    middle = means[:CATEGORIES].mean(dim=0)
    whole_delta = delta.dense()
    for category in range(CATEGORIES):
        expected = whole_delta @ (means[category] - middle)
        found = own[category] @ means[category]
        assert (found - expected).norm() < 0.1 * expected.norm()
        expected = whole_delta @ middle
        assert (shared @ means[category] - expected).norm() < 0.1 * expected.norm()
    benign = whole_delta @ means[-1]
    assert (shared @ means[-1] - benign).norm() < 0.1 * benign.norm()


def test_two_categories_that_are_the_ends_of_one_direction_are_told_apart(delta):
    """Orthogonal projectors of their residuals would be the same one twice."""
    generator = torch.Generator().manual_seed(0)
    common, axis, benign = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator)).Q.T
    classes = torch.arange(3).repeat_interleave(PROMPTS)
    means = torch.stack([common + axis, common - axis, benign])
    states = means[classes] + 0.03 * torch.randn(len(classes), WIDTH, generator=generator)
    reading = Reading.of(states, classes, 2)
    (first, second) = told_apart({"m": split(delta, reading)}, classes, 2)
    assert first["reads_own"] > 0.9 > 0.15 > max(first["reads_others"], second["reads_others"])


def test_the_order_of_the_categories_does_not_matter(delta):
    states, order = planted(), torch.tensor([2, 0, 3, 1])
    one = components(split(delta, Reading.of(states, CLASSES, CATEGORIES)).delta)
    moved = torch.cat([order, torch.tensor([CATEGORIES])])
    other = components(split(delta, Reading.of(states, moved[CLASSES], CATEGORIES)).delta)
    torch.testing.assert_close(other[0], one[0], atol=1e-5, rtol=1e-4)
    for category, place in enumerate(order.tolist()):
        torch.testing.assert_close(other[1 + place], one[1 + category], atol=1e-5, rtol=1e-4)


def test_the_number_of_a_categorys_prompts_does_not_matter():
    """Twice the same prompts of one are the same category."""
    states = planted()
    twice = torch.cat([states[CLASSES == 0], states])
    classes = torch.cat([torch.zeros(PROMPTS, dtype=torch.int64), CLASSES])
    one, other = Reading.of(states, CLASSES, CATEGORIES), Reading.of(twice, classes, CATEGORIES)
    torch.testing.assert_close(one.own, other.own)
    assert torch.nn.functional.cosine_similarity(one.vectors, other.vectors, dim=0).min() > 0.99


def test_a_prompt_that_is_left_out_is_read_as_if_it_were_not_there():
    states = planted(noise=0.5)
    reading, missing = Reading.of(states, CLASSES, CATEGORIES), 3
    keep = torch.arange(len(CLASSES)) != missing
    # by hand: the same weights and ridge without it
    weights = (1.0 / torch.bincount(CLASSES).double())[CLASSES][keep]
    rest, target = states[keep].double(), (CLASSES[keep] == 0).double()
    best = min(
        (_ridge_gap(rest, target, weights, states, ridge, reading, missing) for ridge in RIDGES),
    )
    assert best < 1e-8


RIDGES = [10.0**power for power in range(-6, 2)]


def _ridge_gap(rest, target, weights, states, ridge, reading, missing):
    """How far the reading of the prompt that is left out is from that of one ridge."""
    every = states.double() * (1.0 / torch.bincount(CLASSES).double())[CLASSES].sqrt()[:, None]
    unit = ridge * float(torch.linalg.eigvalsh(every @ every.T).clamp(min=0).mean())
    moments = rest.T @ (rest * weights[:, None]) + unit * torch.eye(WIDTH).double()
    vector = torch.linalg.solve(moments, rest.T @ (target * weights))
    return abs(float(states[missing].double() @ vector - reading.left_out[missing, 0]))


def test_noise_is_not_read():
    """Classes that do not differ: with the prompt itself left out, nothing tells them apart."""
    states = torch.randn(len(CLASSES), WIDTH, generator=torch.Generator().manual_seed(2))
    reading = Reading.of(states, CLASSES, CATEGORIES)
    for category in range(CATEGORIES):
        own = reading.left_out[category == CLASSES, category].mean()
        assert abs(float(own)) < 0.3


def test_what_is_read_counts_by_what_it_does(delta):
    """A module that writes nothing has no say in how well a category is told apart."""
    good, bad = planted(), torch.randn(len(CLASSES), WIDTH)
    zero = LowRankDelta(delta.a, torch.zeros_like(delta.b))
    splits = {
        "good": split(delta, Reading.of(good, CLASSES, CATEGORIES)),
        "bad": split(zero, Reading.of(bad, CLASSES, CATEGORIES)),
    }
    alone = told_apart({"good": splits["good"]}, CLASSES, CATEGORIES)
    assert told_apart(splits, CLASSES, CATEGORIES) == alone
    assert all(each["reads_own"] > 0.9 > 0.2 > each["reads_benign"] for each in alone)


def test_what_stays_whole_is_all_shared(delta):
    made = whole(delta, CATEGORIES)
    assert made.a.shape == (RANK + CATEGORIES, WIDTH)
    shared, *own = components(made)
    torch.testing.assert_close(shared, delta.dense())
    assert not any(bool(each.any()) for each in own)
