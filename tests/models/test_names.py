"""One name for a module of a text model, whatever class is around it."""

import pytest
import torch

from safegene_trl.models.names import (
    component_labels,
    is_label,
    layers_of,
    text_names,
    without_wrapper,
)
from safegene_trl.models.parameters import canonical_modules, own_names, text_modules
from safegene_trl.vectors.family import Family

from ..wrappers import CONFIGS, READS_TEXT, make_wrapper, text_model


@pytest.mark.parametrize(
    ("own", "canonical"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj/1#3", "model.layers.0.mlp.up_proj/1#3"),
        ("language_model.lm_head", "lm_head"),
        ("model.language_model", "model"),
        ("model.language_models.layers.0", "model.language_models.layers.0"),
        ("model.vision_tower.layers.0.mlp", "model.vision_tower.layers.0.mlp"),
        ("layers.3", "layers.3"),
        ("transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_proj"),
    ],
)
def test_names_without_a_wrapper(own, canonical):
    assert without_wrapper(own) == canonical


def test_names_of_the_text_model():
    names = ["model.visual.blocks.0", "model.language_model.layers.0", "lm_head", "model"]
    assert text_names(names) == ["model.language_model.layers.0", "lm_head"]
    plain = ["model.layers.0", "lm_head", "model"]
    assert text_names(plain) == plain


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_model_has_one_set_of_names_and_one_family(kind, tokenizer):
    wrapper = make_wrapper(kind)
    text = text_model(kind, wrapper)
    inside, alone = text_modules(wrapper), text_modules(text)
    linear = {name for name, module in alone.items() if isinstance(module, torch.nn.Linear)}
    assert linear and linear <= inside.keys() and layers_of(inside) == [0, 1]
    assert not any("vis" in name or "projector" in name for name in inside)
    assert {name: name for name in alone} == own_names(text)
    modules = canonical_modules(wrapper)
    assert any("vis" in name for name in modules)  # they are there, under their own names
    for name, own in own_names(wrapper).items():
        assert modules[name] is wrapper.get_submodule(own)
    one, other = Family.of(wrapper, tokenizer), Family.of(text, tokenizer)
    assert one == other and one.architecture == type(text).__name__
    assert Family.of(make_wrapper(kind, seed=1), tokenizer) == one


@pytest.mark.parametrize("kind", READS_TEXT)
@torch.no_grad()
def test_a_wrapper_computes_what_its_text_model_does(kind):
    """From `input_ids`, `attention_mask` and positions that count no padding: nothing of images."""
    wrapper = make_wrapper(kind)
    text = text_model(kind, wrapper)
    ids = torch.randint(5, 290, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = [model(**inputs).logits[mask.bool()] for model in (wrapper, text)]
    torch.testing.assert_close(*logits)
    alone = wrapper(input_ids=ids[:1, 2:], use_cache=False).logits[0]
    torch.testing.assert_close(logits[0][:4], alone)


def test_labels_of_components_can_stand_in_names_of_coefficients():
    names = [
        "shared",
        "Fraud/Deception",
        "Fraud#Deception",
        "fraud",
        "shared",
        "Müll 1",
        "中文",
        "/#",
    ]
    labels = component_labels([*names, "\x1b[2J\n\ud800", "a" * 99, "a" * 98, "../..", "_"])
    assert labels == [
        *("shared", "Fraud_Deception", "Fraud_Deception_2", "fraud", "shared_2", "Müll_1", "中文"),
        *("unnamed", "2J", "a" * 60, "a" * 60 + "_2", "unnamed_2", "unnamed_3"),
    ]
    assert all(map(is_label, labels)) and len(set(labels)) == len(labels)
    assert component_labels(["a_2", "a", "a"]) == ["a_2", "a", "a_3"]
    assert not any(map(is_label, ["", "a/b", "a#0", "a b", "a\n", "a" * 121, 3, None]))
