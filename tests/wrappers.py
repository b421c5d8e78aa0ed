"""Tiny models of text and images, of the architectures as transformers has them, and their text
models.
"""

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Llama4Config,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import without_wrapper
from safegene_trl.models.parameters import linear_shape, text_modules, text_parameters
from safegene_trl.vectors.family import Family

from .conftest import CHAT_TEMPLATE, make_model, make_tokenizer, make_vector, small_shape


TEXT = small_shape(num_hidden_layers=2)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
QWEN_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# for text models that transformers has no class for
SAME_TEXT = {
    "qwen2_5_vl": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3_vl": (Qwen3Config, Qwen3ForCausalLM),
}


def _gemma3():
    return Gemma3Config(
        text_config=TEXT | {"sliding_window": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    )


def _mistral3():
    return Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "pixtral"},
        image_token_index=300,
        tie_word_embeddings=False,
    )


def _qwen3_vl():
    more = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLConfig(text_config=TEXT | MROPE, vision_config=QWEN_VISION | more, **QWEN_TOKENS)


def _qwen3_5():
    text = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    vision = QWEN_VISION | {"num_position_embeddings": 16}
    return Qwen3_5Config(text_config=TEXT | text, vision_config=vision, **QWEN_TOKENS)


def _llama4():
    text = {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    }
    vision = {
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    return Llama4Config(
        text_config=TEXT | text, vision_config=VISION | vision, image_token_index=300
    )


CONFIGS = {
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | MROPE, vision_config=QWEN_VISION, **QWEN_TOKENS
    ),
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "llama4": _llama4,
}
# transformers 5.24 fails on text alone in this one
READS_TEXT = [kind for kind in CONFIGS if kind != "llama4"]


def make_wrapper(kind: str = "gemma3", seed: int = 0):
    """A random model of text and images."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def text_model(kind: str, wrapper):
    """The class of its text model alone, with the same weights."""
    config = wrapper.config.get_text_config()
    if kind in SAME_TEXT:
        config_class, architecture = SAME_TEXT[kind]
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = config_class(**TEXT, rms_norm_eps=config.rms_norm_eps, rope_parameters=rope)
    else:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = architecture(config)
    weights = {without_wrapper(part.name): part.tensor for part in text_parameters(wrapper)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def wrapper_vector(model, tokenizer, layer: int = 1):
    """A vector on some linear layers of a text model, in whatever class."""
    generator = torch.Generator().manual_seed(3)
    deltas = {
        name: LowRankDelta(
            torch.randn(2, shape[1], generator=generator) * 0.2,
            torch.randn(shape[0], 2, generator=generator) * 0.2,
        )
        for name, module in text_modules(model).items()
        if f"layers.{layer}." in name
        and name.endswith(("o_proj", "down_proj", "up_proj"))
        and (shape := linear_shape(module)) is not None
    }
    vector = make_vector(make_model(), tokenizer)
    vector.deltas, vector.family = deltas, Family.of(model, tokenizer)
    vector.selection["selected_layers"] = [layer]
    return vector


def gemma3_processor():
    """A processor of text and images around the tests' tokenizer."""
    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = make_tokenizer(extra=tuple(names.values()))
    tokenizer.init_kwargs["extra_special_tokens"] = names
    tokenizer._set_model_specific_special_tokens(names)
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=CHAT_TEMPLATE)
