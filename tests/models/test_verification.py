"""What goes around a hook is found and named before it costs anything; what no token is sent to is
told from it.
"""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safegene_trl.errors import UnsupportedModelError
from safegene_trl.models.inputs import Sample, batches
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import base_model, canonical_modules, linear_shape
from safegene_trl.recalibration.search import recalibrate

from ..conftest import attachment_of, config_of, make_deltas, make_model, with_lora
from ..recalibration.test_search import calibration_set


BATCH = batches([Sample(list(range(5, 15)), [False] * 6 + [True] * 4)], 1, 0, torch.device("cpu"))[
    0
]
LAYER = "model.layers.1"


def deltas_of(model, parts):
    """A delta on each of the named linear modules."""
    generator = torch.Generator().manual_seed(0)
    modules = canonical_modules(model)
    shapes = {name: linear_shape(modules[name]) for name in parts}
    return {
        name: LowRankDelta(
            torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
        )
        for name, (d_out, d_in) in shapes.items()
    }


def every_linear(model):
    return [name for name, module in canonical_modules(model).items() if linear_shape(module)]


def mlp_of(model):
    return base_model(model).model.layers[1].mlp


def weight_of(linear):
    return getattr(linear, "base_layer", linear).weight


def reading_weights(mlp, x):
    """As a fused kernel computes the block."""
    gate, up = (F.linear(x, weight_of(linear)) for linear in (mlp.gate_proj, mlp.up_proj))
    return F.linear(mlp.act_fn(gate) * up, weight_of(mlp.down_proj))


def dropping_an_output(mlp, x):
    """The module is called, and what it gives is not used."""
    mlp.up_proj(x)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * F.linear(x, weight_of(mlp.up_proj)))


def without_a_gradient(mlp, x):
    with torch.no_grad():
        up = mlp.up_proj(x)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)


def fast_without_gradients(mlp, x):
    return type(mlp).forward(mlp, x) if torch.is_grad_enabled() else reading_weights(mlp, x)


BYPASSES = [
    (reading_weights, "`model.layers.1.mlp.gate_proj` (as 2 more) is never called"),
    (
        dropping_an_output,
        "`model.layers.1.mlp.up_proj` is called, but its output does not reach the logits",
    ),
    (
        without_a_gradient,
        "`model.layers.1.mlp.up_proj` is called, but its output does not reach the logits",
    ),
    (fast_without_gradients, "`model.layers.1.mlp.gate_proj` (as 2 more) is never called"),
]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("bypass", "message"), BYPASSES)
def test_a_bypassed_module_is_refused_by_name(bypass, message, lora):
    model = with_lora(make_model()) if lora else make_model()
    attachment = attachment_of(model, deltas_of(model, every_linear(model)))
    assert attachment.verify(BATCH) == []
    mlp = mlp_of(model)
    mlp.forward = MethodType(bypass, mlp)
    with pytest.raises(UnsupportedModelError) as caught:
        attachment.verify(BATCH)
    assert message in str(caught.value) and "lora_mlp_kernel" in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("bypass", "message"), BYPASSES[:3])
@pytest.mark.parametrize("everything", [False, True])
def test_what_is_bypassed_after_the_check_is_refused_in_the_search(bypass, message, everything):
    model = make_model()
    names = [
        name for name in every_linear(model) if name.startswith(f"{LAYER}.mlp") or not everything
    ]
    attachment = attachment_of(model, deltas_of(model, names))
    attachment.verify(BATCH)
    mlp_of(model).forward = MethodType(bypass, mlp_of(model))
    with pytest.raises(UnsupportedModelError) as caught:
        recalibrate(attachment, calibration_set(), config_of(vector="v", max_evaluations=3), 0)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm4", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_models_pass_and_are_left_as_they_were(kind, dtype):
    model = with_lora(make_model(kind, tied=True), lora_dropout=0.2).to(dtype)
    model.train()
    names = [*every_linear(model)]
    assert "lm_head" in names
    deltas = deltas_of(model, names)
    some, other = names[0], names[-2]
    # A x is 0: no gradient, but not bypassed
    deltas[some] = LowRankDelta(deltas[some].a * 0, deltas[some].b)
    deltas[other] = LowRankDelta(deltas[other].a, deltas[other].b * 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    assert attachment_of(model, deltas, "module").verify(BATCH) == []
    assert all(module.training for module in model.modules()) and torch.equal(
        torch.get_rng_state(), state
    )
    assert trainable == [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class Mixture(nn.Module):
    """Every token goes to expert 0, 1 or 2 by its first feature; none to expert 3."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        tokens, output = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        chosen = (tokens[:, 0] > 0.5).long() + (tokens[:, 0] > -0.5)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                output[chosen == index] = expert(tokens[chosen == index])
        return output.reshape(x.shape)


def mixture():
    model = make_model()
    torch.manual_seed(1)
    model.model.layers[1].mlp = Mixture()
    return model.eval()


def test_an_expert_that_no_token_is_sent_to_is_told_from_a_bypass():
    model = mixture()
    deltas = deltas_of(model, [name for name in every_linear(model) if ".experts." in name])
    attachment = attachment_of(model, deltas, "module")
    experts = f"{LAYER}.mlp.experts"
    assert attachment.verify(BATCH) == [f"{experts}.3.up_proj", f"{experts}.3.down_proj"]
    expert = model.model.layers[1].mlp.experts[1]
    expert.forward = lambda x: F.linear(F.silu(expert.up_proj(x)), expert.down_proj.weight)
    with pytest.raises(
        UnsupportedModelError, match=r"`model.layers.1.mlp.experts.1.down_proj` is never called"
    ):
        attachment.verify(BATCH)


def test_a_mixture_none_of_whose_experts_is_called_is_bypassed():
    model = mixture()
    deltas = deltas_of(
        model, [name for name in every_linear(model) if ".experts." in name or "q_proj" in name]
    )
    moe = model.model.layers[1].mlp
    moe.forward = lambda x: F.linear(
        F.linear(x, moe.experts[0].up_proj.weight), moe.experts[0].down_proj.weight
    )
    with pytest.raises(
        UnsupportedModelError, match=r"experts.0.up_proj` \(as 7 more\) is never called"
    ):
        attachment_of(model, deltas, "module").verify(BATCH)


@pytest.mark.parametrize("held", [0.0, 0.2])
def test_an_expert_that_no_shot_reaches_keeps_what_is_carried(held, monkeypatch):
    objections = iter(["too much", ""])  # shrunk once, towards the lower bound
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda *args: next(objections)
    )
    model = mixture()
    deltas = deltas_of(model, [name for name in every_linear(model) if ".experts." in name])
    carried = dict.fromkeys(deltas, held) if held else None
    attachment = attachment_of(model, deltas, "module", carried)
    start = dict.fromkeys(deltas, 0.5)
    config = config_of(vector="v", max_evaluations=3, min_coefficient=0.05)
    result = recalibrate(attachment, calibration_set(), config, 0, start=start)
    unreached = [name for name in deltas if ".experts.3." in name]
    assert result.scale == 0.8 and result.untouched == unreached and len(unreached) == 2
    # also outside the bounds, never the start
    assert all(result.coefficients[name] == held for name in unreached)
    assert any(result.coefficients[name] != 0.5 for name in deltas if name not in unreached)


def test_vectors_of_make_deltas_pass():
    model = make_model()
    assert attachment_of(model, make_deltas(model)).verify(BATCH) == []
