"""Layer scores against their formulas, and the stability of a selection."""

import pytest
import torch

from safegene_trl.errors import ConfigError
from safegene_trl.extraction.selection import (
    LayerScores,
    activation_contrast,
    at_random,
    bootstrap_stability,
    gradient,
    last_token_states,
    magnitude,
    top_layers,
)
from safegene_trl.models import batch_size
from safegene_trl.models.inputs import batches, tokenize
from safegene_trl.models.losses import cross_entropy
from safegene_trl.models.names import layer_index

from ..conftest import ALONE, ARCHITECTURES, attachment_of, make_deltas, make_model


def test_activation_contrast_formula():
    aligned = [torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 5.0]]])]
    degraded = [torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 5.0]]])]
    assert activation_contrast(aligned, degraded).mean().tolist() == pytest.approx(
        [1.0 - 0.5, 1.0 - 0.0]
    )


def test_gradient_is_the_fall_of_the_loss_per_coefficient(tokenizer):
    model = make_model()
    deltas = make_deltas(model)
    samples = [
        tokenize(tokenizer, [{"role": "user", "content": text}], "sorry i cannot help")
        for text in ("hello", "go on")
    ]
    scores = gradient(model, deltas, samples, 0, ALONE).samples[0][1]
    assert scores.shape == (2, 3) and not scores[:, 0].any()  # the vector leaves layer 0 alone

    def loss(sample, layer, size):
        (batch,) = batches([sample], 1, 0, torch.device("cpu"))
        with torch.no_grad(), attachment_of(model, deltas).applied(torch.eye(2)[layer - 1] * size):
            return float(cross_entropy(model, batch).sum()) / sum(sample.is_response)

    for row, sample in enumerate(samples):
        for layer in (1, 2):
            slope = (loss(sample, layer, 1e-2) - loss(sample, layer, -1e-2)) / 2e-2
            assert float(scores[row, layer]) == pytest.approx(-slope, rel=0.02, abs=1e-3)


def test_magnitude_is_the_frobenius_norm():
    deltas = make_deltas(make_model())
    found = magnitude(deltas).mean()
    expected = [
        sum(
            float(delta.dense().square().sum())
            for name, delta in deltas.items()
            if layer_index(name) == layer
        )
        ** 0.5
        for layer in range(3)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_random_scores_are_seeded():
    assert torch.equal(at_random(5, 1).mean(), at_random(5, 1).mean())
    assert not torch.equal(at_random(5, 1).mean(), at_random(5, 2).mean())


def test_stability_of_a_clear_and_of_a_chance_selection():
    clear = LayerScores([(1.0, torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20, 1))])
    record = bootstrap_stability(clear, 0.5, resamples=50, seed=0)
    assert record == {"mean_jaccard": 1.0, "inclusion": [0, 0, 1, 1], "resamples": 50}
    chance = LayerScores([(1.0, torch.rand(20, 8, generator=torch.Generator().manual_seed(0)))])
    record = bootstrap_stability(chance, 0.5, resamples=50, seed=0)
    assert 0.2 < record["mean_jaccard"] < 0.9 and sum(record["inclusion"]) == pytest.approx(4)
    assert record == bootstrap_stability(chance, 0.5, resamples=50, seed=0)


def test_states_are_those_of_the_last_prompt_token(tokenizer):
    model = make_model()
    states = last_token_states(model, tokenizer, ["hello", "how do i cook"], ALONE)
    assert states.shape == (2, 3, 32) and states.dtype == torch.float32
    ids = tokenizer(
        "<|user|>hello<|end|><|assistant|>", return_tensors="pt", add_special_tokens=False
    )["input_ids"]
    captured = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    model(ids)
    handle.remove()
    torch.testing.assert_close(states[0, 0], captured[0][0, -1].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("limit", [100, 2])
def test_prompts_that_are_read_together_give_the_states_that_they_give_alone(
    limit, kind, tokenizer, monkeypatch
):
    """On a GPU, and where its memory is for `limit` of them."""
    model = make_model(kind)
    prompts = ["hello " * count for count in (5, 1, 9, 3, 7)]
    widths, forward = [], model.forward

    def small(**given):
        widths.append(len(given["input_ids"]))
        if widths[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**given)

    monkeypatch.setattr(model, "forward", small)
    alone = last_token_states(model, tokenizer, prompts, ALONE)
    assert widths == [1] * 5  # on a CPU
    each = [last_token_states(model, tokenizer, [prompt], ALONE) for prompt in prompts]
    assert torch.equal(alone, torch.cat(each))
    widths.clear()
    monkeypatch.setattr(batch_size, "has_own_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**36)
    together = last_token_states(model, tokenizer, prompts, ALONE)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert widths[0] == 5 and widths[-1] == (5 if limit == 100 else 1)
    assert max(widths[-3:]) <= limit


def test_a_changed_layer_shows_from_that_layer_on(tokenizer):
    aligned, degraded = make_model(), make_model()
    with torch.no_grad():
        degraded.model.layers[1].mlp.down_proj.weight.add_(0.5)

    def difference(prompts):
        first, second = (
            last_token_states(model, tokenizer, prompts, ALONE) for model in (aligned, degraded)
        )
        return (first - second).norm(dim=-1).mean(dim=0)

    changes = difference(["hello"])
    assert changes[0] == 0 and changes[1] > 0 and changes[2] > 0


def test_top_layers():
    assert top_layers([0.1, 0.9, -0.3, 0.5], 0.5) == [1, 3]
    assert top_layers([0.1, 0.9], 0.01) == [1]
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="layer_share"):
            top_layers([0.1], share)
