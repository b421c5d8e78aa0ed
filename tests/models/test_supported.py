"""Fine-tunes that cannot be merged exactly are refused by name."""

import tempfile

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from safegene_trl.checkpoints.adapter_output import save_adapter
from safegene_trl.checkpoints.merge_terms import NO_VECTOR
from safegene_trl.errors import UnsupportedModelError
from safegene_trl.models.supported import check_adapter_output, check_supported, check_untied

from ..architectures import make_architecture
from ..conftest import ALONE, make_model, with_lora
from ..quantization import quantised as quantised_by_bnb
from ..quantization import wide_model
from .test_parameters import gpt2


QUANTIZED_BY = ("gptq", "awq", "fp8", "torchao", "hqq", "compressed-tensors", "quanto", "eetq")


class OfTorchAo(torch.Tensor):
    """In the place of a tensor of torchao's."""


OfTorchAo.__module__ = "torchao.dtypes"


def refused():
    for method in QUANTIZED_BY:
        quantised = make_model()
        quantised.is_quantized, quantised.quantization_method = True, method
        yield f"quantised by {method}", quantised, f"is quantised by {method}, and.*16-bit base"
    unknown = make_model()
    unknown.is_quantized = True
    yield "quantised by something", unknown, "is quantised by another library"
    for kind in (torch.float8_e4m3fn, torch.int8):
        numbers = make_model()
        weight = numbers.model.layers[0].mlp.up_proj.weight.data.to(kind)
        numbers.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, False)
        said = str(kind).removeprefix("torch.")
        yield said, numbers, rf"layers.0.mlp.up_proj.weight` holds quantised numbers \({said}\)"
    ao = make_model()
    ao.model.norm.weight = torch.nn.Parameter(ao.model.norm.weight.data.as_subclass(OfTorchAo))
    yield "torchao's own", ao, "is quantised by torchao"
    with tempfile.TemporaryDirectory() as folder:
        wide_model().save_pretrained(folder)
        yield "no LoRA on a quantised base", quantised_by_bnb(folder, 8), "has no LoRA: train one"
        started = with_lora(quantised_by_bnb(folder, 4), init_lora_weights=True)
    started.peft_config["default"].init_lora_weights = "loftq"
    yield "LoftQ on a quantised base", started, "'loftq'` on a quantised base"
    yield (
        "tied head",
        with_lora(make_model(), modules_to_save=["lm_head"]),
        "model ties to `model.embed_tokens`",
    )
    yield (
        "tied embeddings",
        with_lora(make_model(), modules_to_save=["embed_tokens"]),
        "ties to `lm_head`",
    )
    both = ["embed_tokens", "lm_head"]
    yield (
        "both of a tied pair, apart",
        with_lora(make_model(), modules_to_save=both),
        "train with `ensure_weight_tying",
    )
    yield (
        "LoRA on a tied head",
        with_lora(make_model(), target_modules=["lm_head"]),
        "LoRA on `lm_head`.*shares",
    )
    tied = with_lora(
        make_model(), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    yield "LoRA on tied embeddings", tied, "LoRA on `(lm_head|model.embed_tokens)`.*shares"
    yield (
        "other names",
        with_lora(gpt2(), target_modules=["lm_head"]),
        "LoRA on `lm_head`.*`transformer.wte.weight`",
    )
    saved_head = with_lora(
        gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"]
    )
    yield "a head that is saved, under other names", saved_head, "ties to `transformer.wte`"
    parameter = with_lora(
        make_architecture("mixtral"), target_modules=["q_proj"], target_parameters=["gate.weight"]
    )
    yield (
        "a LoRA on a router",
        parameter,
        r"LoRA on the parameter `model\.layers\.0\.mlp\.gate\.weight`.*`target_parameters`",
    )
    several = with_lora(make_model(tied=False), modules_to_save=["lm_head"])
    several.add_adapter(
        "second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    yield "a head of two adapters", several, "saved whole by several adapters"
    two = with_lora(make_model(), use_dora=True)
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    yield "two DoRA adapters", two, "the one active adapter"
    yield "LoRA bias", with_lora(make_model(), lora_bias=True, bias="none"), "lora_bias"
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    yield "IA3", get_peft_model(make_model(), ia3), "uses PEFT's IA3.*only LoRA can be merged"
    ada = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    yield "AdaLoRA", get_peft_model(make_model(), ada), "uses PEFT's ADALORA"
    for kind in (PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig):
        soft = kind(num_virtual_tokens=4, task_type="CAUSAL_LM")
        yield (
            kind.__name__,
            get_peft_model(make_model(), soft),
            f"uses PEFT's {soft.peft_type.value}",
        )
    norms = with_lora(make_model())
    norms.get_base_model().model.norm.requires_grad_(True)
    yield (
        "a norm that was unfrozen by hand",
        norms,
        "trains `model.norm.weight` beside its LoRA.*`modules_to_save`",
    )
    beside = with_lora(make_model())
    beside.value_head = torch.nn.Linear(2, 2)
    yield "a head outside the model", beside, "`value_head.weight`, which is no part"
    merged = with_lora(make_model())
    merged.merge_adapter()
    yield (
        "a merged adapter",
        merged,
        r"on `model.layers.0.self_attn.q_proj` is merged.*`unmerge_adapter\(\)`",
    )
    louder = with_lora(make_model())
    louder.base_model.model.model.layers[1].self_attn.q_proj.set_scale("default", 0.25)
    yield (
        "a scaling that is not saved",
        louder,
        r"The LoRA `default` on `model.layers.1.self_attn.q_proj` acts with a scaling of .* saves it with .*`unscale_layer\(\)`",
    )
    yield "no transformers model", torch.nn.Linear(2, 2), "not a transformers model"


@pytest.mark.parametrize(
    ("model", "message"), [case[1:] for case in refused()], ids=[case[0] for case in refused()]
)
def test_refused_by_name(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_supported(model)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (
            "llama",
            {"modules_to_save": ["post_attention_layernorm"]},
            "model.layers.0.post_attention_layernorm",
        ),
        ("qwen2", {"bias": "all"}, "model.layers.0.self_attn.q_proj.bias"),
        (
            "qwen2",
            {"bias": "lora_only", "target_modules": ["v_proj"]},
            "model.layers.0.self_attn.v_proj.bias",
        ),
        ("llama", {"bias": "all"}, None),  # which has no biases
        ("qwen2", {"bias": "lora_only", "target_modules": ["up_proj"]}, None),
    ],
)
def test_an_adapter_cannot_hold_what_is_trained_whole(kind, options, named):
    model = with_lora(make_model(kind), **options)
    check_supported(model)
    if named is None:
        check_adapter_output(model)
    else:
        with pytest.raises(
            UnsupportedModelError,
            match=rf"trains `{named}` itself.*`output\.output_format: merged`",
        ):
            check_adapter_output(model)


def test_supported_models_pass(tokenizer, tmp_path):
    for model in (
        make_model(),
        with_lora(make_model()),
        with_lora(make_model("qwen2"), use_rslora=True),
    ):
        check_supported(model)
    save_adapter(with_lora(make_model()), NO_VECTOR, "base", tokenizer, tmp_path, ALONE)


def test_a_vector_on_a_shared_weight_is_refused():
    shared = make_model(tied=False)
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        UnsupportedModelError, match=r"changes `model.layers.1.mlp.up_proj`, whose weight"
    ):
        check_untied(shared, ["model.layers.2.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    check_untied(shared, ["model.layers.2.mlp.up_proj"])
