"""A compiled model gives what it gives eagerly, and comes out compiled as it went in. No C++
compiler is needed for this.
"""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from safegene_trl import SafeGeneCallback
from safegene_trl.models.eager import running_eagerly
from safegene_trl.models.parameters import (
    base_model,
    canonical_modules,
    canonical_parameters,
    uncompiled,
)
from safegene_trl.vectors.family import Family

from ..conftest import attachment_of, config_of, make_deltas, make_model, make_vector, with_lora
from ..recalibration.test_search import calibration_set, helpful_deltas, run


IDS = torch.arange(24).reshape(2, 12) + 5
SEARCH = {"max_evaluations": 2}
BACKEND = "eager"  # dynamo traces and guards as ever, and the graph is run as it is


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model):
    return torch.compile(model, backend=BACKEND)


def in_place(model):
    model.compile(backend=BACKEND)
    return model


def by_layer(model):
    for layer in base_model(model).model.layers:
        layer.compile(backend=BACKEND)
    return model


def replaced_layers(model):
    layers = base_model(model).model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend=BACKEND)
    return model


def replaced_linears(model):
    for layer in base_model(model).model.layers:
        layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend=BACKEND)
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


WAYS = [whole, in_place, by_layer, replaced_layers, replaced_linears, forward]


@pytest.fixture(scope="module")
def eager():
    """What the plain model gives, without and with a LoRA, and the deltas and data for it."""
    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    found = {
        lora: run(with_lora(make_model()) if lora else make_model(), deltas, data, **SEARCH)
        for lora in (False, True)
    }
    return found, deltas, data


@pytest.mark.parametrize(
    ("way", "lora"),
    [(way, False) for way in WAYS]
    + [(whole, True), (replaced_layers, True), (replaced_linears, True)],
)
def test_compiled_models_give_the_eager_result(way, lora, eager):
    expected, deltas, data = eager
    for used in (False, True):  # before and after a first call, which compiles
        model = way(with_lora(make_model()) if lora else make_model())
        if used:
            model(IDS)
        modules = dict(model.named_modules())
        own = {name: dict(module.__dict__) for name, module in modules.items()}
        found = run(model, deltas, data, **SEARCH)
        assert found == expected[lora]
        for name, module in model.named_modules():
            assert module is modules[name] and module.__dict__.keys() == own[name].keys()
            assert all(
                module.__dict__[key] is value
                for key, value in own[name].items()
                if key != "_forward_hooks"
            )


def test_nothing_is_compiled_again_afterwards():
    counter = torch._dynamo.testing.CompileCounter()
    model = make_model()
    layer = model.model.layers[1]
    model.model.layers[1] = torch.compile(layer, backend=counter)
    model(IDS)
    count = counter.frame_count
    assert count > 0
    run(model, make_deltas(make_model()), max_evaluations=1)
    model(IDS)
    assert counter.frame_count == count


@pytest.mark.parametrize("way", WAYS)
def test_names_are_those_of_the_plain_model(way, tokenizer):
    plain, model = make_model(), way(make_model())
    assert list(canonical_modules(model)) == list(canonical_modules(plain))
    assert [p.name for p in canonical_parameters(model)] == [
        p.name for p in canonical_parameters(plain)
    ]
    assert Family.of(model, tokenizer) == Family.of(plain, tokenizer)
    assert isinstance(canonical_modules(model)["model.layers.1.mlp.down_proj"], nn.Linear)


def test_compiled_functions_inside_wrappers_run_eagerly():
    """As accelerate's autocast wraps a forward that was compiled before."""
    model = make_model()
    compiled = torch.compile(model.forward, backend=BACKEND)
    model.forward = lambda *args, **kwargs: compiled(*args, **kwargs)
    model(IDS)
    attachment = attachment_of(model, make_deltas(make_model()))
    with torch.no_grad(), running_eagerly(model):
        plain = model(IDS).logits
        with attachment.applied(torch.ones(2)):
            assert (model(IDS).logits - plain).abs().max() > 1e-2


def test_flex_attention_stays_the_compiled_kernel_that_it_is():
    model = make_model()
    function = torch.compile(lambda x: torch.compiler.is_compiling(), backend=BACKEND)
    assert function(torch.ones(1))
    with running_eagerly(model):
        assert not function(torch.ones(1))
    model.config._attn_implementation = "flex_attention"
    with running_eagerly(model):
        assert function(torch.ones(1))


@pytest.mark.parametrize("way", ["compile", "wrapper", "forward"])
def test_beside_flex_attention_modules_are_set_aside_one_by_one(way):
    model = make_model()
    model.config._attn_implementation = "flex_attention"
    layer, counter = model.model.layers[1], torch._dynamo.testing.CompileCounter()
    if way == "compile":
        layer.mlp.compile(backend=counter)
    elif way == "wrapper":
        layer.mlp = torch.compile(layer.mlp, backend=counter)
    else:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend=counter)
    x, name = torch.randn(1, 4, 32), "model.layers.1.mlp.down_proj"
    plain = layer.mlp(x)
    count = counter.frame_count
    attachment = attachment_of(model, {name: make_deltas(make_model())[name]})
    with torch.no_grad(), running_eagerly(model), attachment.applied(torch.ones(1)):
        assert (layer.mlp(x) - plain).abs().max() > 1e-2
    assert count > 0 and torch.equal(layer.mlp(x), plain) and counter.frame_count == count


def test_uncompiled():
    model = make_model()
    assert uncompiled(model) is model and uncompiled(torch.compile(model, backend=BACKEND)) is model


@pytest.mark.parametrize("given", ["torch_compile", "compiled model", "compiled layers"])
def test_a_trainer_with_compile_gets_the_eager_report(given, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    make_vector(make_model(), tokenizer).save_pretrained(tmp_path / "vector")
    model = {"compiled model": whole, "compiled layers": replaced_layers}.get(
        given, lambda model: model
    )(make_model())

    def report_of(model, name, **arguments):
        config = config_of(
            vector=str(tmp_path / "vector"),
            max_evaluations=2,
            num_test_prompts=0,
            num_task_shots=4,
            num_safety_shots=4,
        )
        callback = SafeGeneCallback(config)
        rows = [
            {"input_ids": list(range(5 + i, 25 + i)), "labels": list(range(5 + i, 25 + i))}
            for i in range(8)
        ]
        args = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=1,
            learning_rate=0.0,  # compiled steps are rounded otherwise
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # the Trainer reads no signature of a compiled model
            save_strategy="no",
            **arguments,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[callback],
            data_collator=default_data_collator,
        )
        trainer.train()
        return callback.report

    compile_too = (
        {"torch_compile": True, "torch_compile_backend": BACKEND}
        if given == "torch_compile"
        else {}
    )
    expected, found = report_of(make_model(), "plain"), report_of(model, "compiled", **compile_too)
    for key in ("coefficients", "held_out", "history", "decision", "model"):
        assert found[key] == expected[key], key
