"""Activation contrast against its formula."""

import pytest
import torch

from safegene_trl.errors import ConfigError
from safegene_trl.selection import activation_contrast, last_token_states, top_layers

from .conftest import make_model


def test_formula():
    aligned = {"bad": torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), "good": torch.tensor([[[0.0, 2.0], [0.0, 5.0]]])}
    degraded = {"bad": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), "good": torch.tensor([[[0.0, 1.0], [0.0, 5.0]]])}
    scores = activation_contrast(lambda p: aligned[p[0]], lambda p: degraded[p[0]], ["bad"], ["good"])
    assert scores == pytest.approx([1.0 - 0.5, 1.0 - 0.0])


def test_states_are_those_of_the_last_prompt_token(tokenizer):
    model = make_model()
    states = last_token_states(model, tokenizer, ["hello", "how do i cook"])
    assert states.shape == (2, 3, 32) and states.dtype == torch.float32
    ids = tokenizer("<|user|>hello<|end|><|assistant|>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    captured = []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: captured.append(output))
    model(ids)
    handle.remove()
    torch.testing.assert_close(states[0, 0], captured[0][0, -1].detach(), atol=1e-5, rtol=1e-5)


def test_a_changed_layer_shows_from_that_layer_on(tokenizer):
    aligned, degraded = make_model(), make_model()
    with torch.no_grad():
        degraded.model.layers[1].mlp.down_proj.weight.add_(0.5)

    def difference(prompts):
        first, second = (last_token_states(model, tokenizer, prompts) for model in (aligned, degraded))
        return (first - second).norm(dim=-1).mean(dim=0)

    changes = difference(["hello"])
    assert changes[0] == 0 and changes[1] > 0 and changes[2] > 0


def test_top_layers():
    assert top_layers([0.1, 0.9, -0.3, 0.5], 0.5) == [1, 3]
    assert top_layers([0.1, 0.9], 0.01) == [1]
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="layer_share"):
            top_layers([0.1], share)
