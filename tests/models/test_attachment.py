"""λ-scaled hooks: what they compute, and that they leave nothing behind."""

import pytest
import torch

from safegene_trl.models.attachment import VectorAttachment, frozen_for_calibration
from safegene_trl.models.coefficients import CoefficientSpace
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import ALONE, attached, attachment_of, make_deltas, make_model, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_hooks_equal_adding_the_delta_to_the_weights(kind):
    model = make_model(kind)
    deltas = make_deltas(model)
    index = {name: int("layers.2" in name) for name in deltas}
    coefficients = torch.tensor([0.7, 0.4])
    with torch.no_grad(), attachment_of(model, deltas).applied(coefficients):
        hooked = model(IDS).logits
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += coefficients[index[name]] * delta.dense()
        torch.testing.assert_close(hooked, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_hooks_add_to_the_task_lora():
    model = with_lora(make_model())
    deltas = make_deltas(make_model())
    with torch.no_grad():
        plain = model(IDS).logits
        with attached(model, deltas, 1.0):
            hooked = model(IDS).logits
        with attached(model, deltas, 0.0):
            zeroed = model(IDS).logits
    assert (hooked - plain).abs().max() > 1e-2
    torch.testing.assert_close(zeroed, plain)


def test_gradient_of_coefficients_matches_finite_differences():
    model = make_model().double()
    deltas = make_deltas(model)
    attachment = attachment_of(model, deltas)

    def loss(values):
        with attachment.applied(values):
            return model(IDS).logits.log_softmax(-1)[..., 7].mean()

    values = torch.tensor([0.5, 0.8], dtype=torch.float64, requires_grad=True)
    with frozen_for_calibration(model):
        (gradient,) = torch.autograd.grad(loss(values), values)
        for i in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[i] = 1e-3
            with torch.no_grad():
                slope = (loss(values + step) - loss(values - step)) / 2e-3
            assert abs(slope - gradient[i]) < 1e-5 * abs(float(gradient[i]))


def test_every_sample_and_every_part_may_have_its_own_coefficient():
    model = make_model().double()
    deltas = make_deltas(model)
    # two components: a layer's coefficient for each of its parts
    space = CoefficientSpace.of(deltas, [1, 1], "layer")
    attachment, parts = (
        VectorAttachment(model, deltas, space, ALONE),
        {name: space.index(name) for name in deltas},
    )
    values = torch.tensor([0.5, 0.8, 1.3, 0.2], dtype=torch.float64)

    def losses(ids, coefficients):
        with attachment.applied(coefficients):
            return model(ids).logits.log_softmax(-1)[..., 7].mean(dim=1)

    with frozen_for_calibration(model):
        rows = values.repeat(2, 1).requires_grad_()
        (by_sample,) = torch.autograd.grad(losses(IDS, rows).sum(), rows)
        for i, ids in enumerate(IDS):
            alone = values.clone().requires_grad_()
            (expected,) = torch.autograd.grad(losses(ids[None], alone).sum(), alone)
            torch.testing.assert_close(by_sample[i], expected, atol=1e-12, rtol=1e-8)
        with torch.no_grad():
            hooked = losses(IDS, values)
            for name, delta in deltas.items():
                model.get_submodule(name).weight += (
                    delta.b.double() * values[parts[name]]
                ) @ delta.a.double()
            torch.testing.assert_close(hooked, losses(IDS, torch.zeros(4)), atol=1e-6, rtol=1e-6)


def test_tokens_without_samples_share_the_gradient():
    """A layer that sees the tokens in a row, or only some of them, as in a mixture of experts."""
    layer = torch.nn.Linear(4, 3, bias=False)
    delta = {"0": LowRankDelta(torch.randn(2, 4), torch.randn(3, 2))}
    model = torch.nn.Sequential(layer)
    attachment = attachment_of(model, delta, "module")
    for tokens, exact in ((6, True), (5, False)):
        x, rows = torch.randn(tokens, 4), torch.full((2, 1), 0.7, requires_grad=True)
        with attachment.applied(rows):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), rows)
        total = torch.tensor([0.7], requires_grad=True)
        with attachment.applied(total):
            (expected,) = torch.autograd.grad(model(x).square().sum(), total)
        torch.testing.assert_close(gradient.sum(dim=0), expected)
        assert torch.allclose(gradient[0], gradient[1]) != exact


def test_nothing_is_left_after_an_exception():
    model = with_lora(make_model())
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    deltas = make_deltas(make_model())
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def interrupted():
        with frozen_for_calibration(model), attached(model, deltas):
            # the layers' calls
            assert hooks_of(model) == len(deltas) + len({name.split(".")[2] for name in deltas})
            assert not any(parameter.requires_grad for parameter in model.parameters())
            torch.rand(3)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        interrupted()
    assert hooks_of(model) == 0
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    } == trainable
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_coefficients_are_not_rounded_to_the_models_type():
    """0.5 and 0.5017 are one number in bfloat16; what the hooks add differs all the same."""
    layer = torch.nn.Linear(8, 6, bias=False).bfloat16()
    torch.nn.init.zeros_(layer.weight)
    model = torch.nn.Sequential(layer)
    generator = torch.Generator().manual_seed(0)
    delta = {
        "0": LowRankDelta(
            torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator)
        )
    }
    attachment = attachment_of(model, delta, "module")
    x = torch.randn(500, 8, generator=generator).bfloat16()
    near, far = torch.tensor([0.5]), torch.tensor([0.5017])
    assert near.bfloat16() == far.bfloat16() and far.bfloat16() != far

    def added(values):
        with attachment.applied(values):
            return model(x)

    low = x @ delta["0"].a.bfloat16().T
    expected = (far * low.float()).bfloat16() @ delta["0"].b.bfloat16().T
    with torch.no_grad():
        assert torch.equal(added(far), expected) and not torch.equal(added(far), added(near))
    # ...and so does the gradient of what comes before it.
    inputs = x.float().requires_grad_()
    gradients = []
    for values in (near, far):
        with attachment.applied(values):
            gradients.append(torch.autograd.grad(model(inputs.bfloat16()).float().sum(), inputs)[0])
    assert not torch.equal(*gradients)
    values = far.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(added(values).float().sum(), values)
    assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()


def test_what_the_weights_hold_is_taken_off():
    model = make_model()
    deltas = make_deltas(model)
    with torch.no_grad():
        plain = model(IDS).logits
        carrying = attachment_of(model, deltas, carried={"layers.1": 0.3, "layers.2": 0.7})
        with carrying.applied(torch.tensor([0.3, 0.7])):
            torch.testing.assert_close(model(IDS).logits, plain, atol=0, rtol=0)
        with carrying.applied(torch.tensor([0.8, 0.7])):
            hooked = model(IDS).logits
        with attachment_of(model, deltas).applied(torch.tensor([0.5, 0.0])):
            torch.testing.assert_close(model(IDS).logits, hooked)
