"""Which layers a safety vector acts in, chosen by data (SafeGene, arXiv 2606.06519), and how stable
the choice is.

`activation_contrast`, the method's own: with `h_l(x)` the residual stream after layer `l` at the
last prompt token,

    d_l(x) = ‖h_l^aligned(x) − h_l^degraded(x)‖ / ‖h_l^aligned(x)‖
    s_l = mean_{harmful x} d_l(x) − mean_{benign x} d_l(x)

Differences accumulate along the residual stream, so late layers tend to score higher; the scores
are stored with the vector so that this can be seen.

`gradient`: how fast the degraded model's loss on the aligned model's refusals falls as the vector
enters layer `l`, `s_l = −∂L/∂λ_l` at λ = 0. Signed, because a coefficient is never negative: a
layer that only helps when it is subtracted is of no use.

Controls: `magnitude` (`s_l = ‖V_l‖_F`), `random`, `all`.

Safety regions found on different prompts overlap little (arXiv 2602.17696), so
`bootstrap_stability` draws the prompts again and again and says how often each layer is selected.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import ConfigError
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.coefficients import CoefficientSpace
from ..models.inputs import Sample, batches
from ..models.losses import cross_entropy
from ..models.low_rank import LowRankDelta
from ..models.names import layer_index
from ..models.reasoning import AS_TEMPLATE, PromptStyle
from .prompt_passes import Places, read_prompts


@dataclass(frozen=True)
class LayerScores:
    """Scores of all layers, as a weighted sum of means over prompts.

    Attributes:
        samples: `(sign, values)` with values of shape prompts×layers.
    """

    samples: Sequence[tuple[float, torch.Tensor]]

    def mean(self) -> torch.Tensor:
        """Score of every layer, float64."""
        return torch.stack(
            [sign * values.double().mean(dim=0) for sign, values in self.samples]
        ).sum(dim=0)

    def resampled(self, generator: torch.Generator) -> "LayerScores":
        """The same with as many prompts drawn from its own, with replacement."""
        return LayerScores(
            [
                (sign, values[torch.randint(len(values), (len(values),), generator=generator)])
                for sign, values in self.samples
            ]
        )


def last_token_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sharding: Sharding,
    style: PromptStyle = AS_TEMPLATE,
) -> torch.Tensor:
    """Residual stream after every layer at the last prompt token: float32, prompts×layers×hidden.
    Collective.

    transformers gives the last layer's state after the final norm, so does this.
    """

    def states(tokens: dict[str, torch.Tensor], places: Places) -> torch.Tensor:
        output = model(**tokens, output_hidden_states=True, use_cache=False)
        hidden_states = [hidden[places].float().cpu() for hidden in output.hidden_states[1:]]
        return torch.stack(hidden_states, dim=1)

    return read_prompts(model, tokenizer, prompts, sharding, style, states)


def activation_contrast(
    aligned: Sequence[torch.Tensor], degraded: Sequence[torch.Tensor]
) -> LayerScores:
    """The scores by activations.

    Args:
        aligned: States (prompts×layers×hidden) of the aligned model on harmful and on benign
            prompts.
        degraded: The same of the degraded model.
    """
    harmful, benign = (
        (reference - changed).norm(dim=-1) / reference.norm(dim=-1)
        for reference, changed in zip(aligned, degraded, strict=True)
    )
    return LayerScores([(1.0, harmful), (-1.0, benign)])


def gradient(
    degraded: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    refusals: Sequence[Sample],
    pad_id: int,
    sharding: Sharding,
) -> LayerScores:
    """The scores by gradients of the degraded model's loss (nats per response token) on refusals.
    Collective.
    """
    rank = next(iter(deltas.values())).a.shape[0]
    space = CoefficientSpace.of(deltas, [rank], "layer")
    attachment = VectorAttachment(degraded, deltas, space, sharding)
    layer_of = {
        name: layer_index(module) or 0 for module, own in space.modules.items() for name in own
    }
    columns = torch.tensor([layer_of[name] for name in space.names])
    coefficients = torch.zeros(len(space.names), device=sharding.device, requires_grad=True)
    rows = torch.zeros(len(refusals), num_layers(deltas))
    with frozen_for_calibration(degraded), sharding.forward_passes():
        for row, sample in zip(rows, refusals, strict=True):
            (batch,) = batches([sample], 1, pad_id, sharding.device)
            with attachment.applied(coefficients):
                loss = cross_entropy(degraded, batch).sum() / sum(sample.is_response)
                row[columns] = -torch.autograd.grad(loss, coefficients)[0].cpu()
            sharding.reshard()
    return LayerScores([(1.0, rows)])


def magnitude(deltas: Mapping[str, LowRankDelta]) -> LayerScores:
    """The scores by the vector's own size: the Frobenius norm of all its deltas in a layer."""
    squares = torch.zeros(1, num_layers(deltas))
    for name, delta in deltas.items():
        squares[0, layer_index(name) or 0] += delta.inner(delta)
    return LayerScores([(1.0, squares.sqrt())])


def at_random(layers: int, seed: int) -> LayerScores:
    """Scores without meaning, to compare with."""
    return LayerScores(
        [(1.0, torch.rand(1, layers, generator=torch.Generator().manual_seed(seed)))]
    )


def num_layers(deltas: Iterable[str]) -> int:
    """How many layers there are up to the last one that a module of the vector is in."""
    return 1 + max(layer_index(name) or 0 for name in deltas)


def top_layers(scores: Iterable[float], share: float) -> list[int]:
    """Indices, in order, of the `share` (0–1] of layers with the highest scores; at least one
    layer.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"`layer_share` is {share}: it must lie above 0 and at most at 1.")
    scores = list(scores)
    count = max(1, round(len(scores) * share))
    return sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:count])


def bootstrap_stability(scores: LayerScores, share: float, resamples: int, seed: int) -> dict:
    """How much the selected layers depend on the prompts.

    Returns:
        `mean_jaccard`: mean Jaccard index (0–1) between the selection and those from resampled
            prompts;
        `inclusion`: share of resamples that select each layer; `resamples`.
    """
    chosen = set(top_layers(scores.mean().tolist(), share))
    generator = torch.Generator().manual_seed(seed)
    inclusion = torch.zeros(len(scores.mean()), dtype=torch.float64)
    jaccards = []
    for _ in range(resamples):
        again = set(top_layers(scores.resampled(generator).mean().tolist(), share))
        jaccards.append(len(chosen & again) / len(chosen | again))
        inclusion[list(again)] += 1 / resamples
    return {
        "mean_jaccard": sum(jaccards) / resamples,
        "inclusion": [round(value, 6) for value in inclusion.tolist()],
        "resamples": resamples,
    }


@dataclass(frozen=True)
class Evidence:
    """What layers may be scored by.

    Attributes:
        deltas: The vector's, of all layers.
        refusals: The aligned model's own, their first tokens.
        aligned_states: States of the aligned model on harmful and on benign prompts; none unless
            the method reads states.
        load_degraded: Loads the degraded model and says how it is spread. Collective.
        states: The same states of a model. Collective.
        pad_id: The tokenizer's.
        seed: For what is drawn.
    """

    deltas: Mapping[str, LowRankDelta]
    refusals: Sequence[Sample]
    aligned_states: Sequence[torch.Tensor]
    load_degraded: Callable[[], tuple[nn.Module, Sharding]]
    states: Callable[[nn.Module, Sharding], Sequence[torch.Tensor]]
    pad_id: int
    seed: int


@dataclass(frozen=True)
class Selection:
    """A way to select layers.

    Attributes:
        scores: The score of every layer. Collective.
        reads_states: Whether it reads both models' states.
        takes_gradients: Whether it takes gradients of the degraded model.
    """

    scores: Callable[[Evidence], LayerScores]
    reads_states: bool = False
    takes_gradients: bool = False

    @property
    def runs_models(self) -> bool:
        """Whether it takes more than the deltas."""
        return self.reads_states or self.takes_gradients


def _by_activations(evidence: Evidence) -> LayerScores:
    states = evidence.states(*evidence.load_degraded())
    return activation_contrast(evidence.aligned_states, states)


def _by_gradient(evidence: Evidence) -> LayerScores:
    degraded, sharding = evidence.load_degraded()
    return gradient(degraded, evidence.deltas, evidence.refusals, evidence.pad_id, sharding)


def _at_random(evidence: Evidence) -> LayerScores:
    return at_random(num_layers(evidence.deltas), evidence.seed)


SELECTIONS: dict[str, Selection] = {
    "activation_contrast": Selection(_by_activations, reads_states=True),
    "gradient": Selection(_by_gradient, takes_gradients=True),
    "magnitude": Selection(lambda evidence: magnitude(evidence.deltas)),
    "random": Selection(_at_random),
    "all": Selection(_at_random),
}
