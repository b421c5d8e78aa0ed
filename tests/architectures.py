"""Tiny random models of the architectures that the matrix of fine-tunes is tried on."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from .conftest import small_shape


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# by name: the config's class, and what it has that a Llama's has not; None takes a setting away
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **MOE}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **MOE},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": None,
            **MOE,
            **MLA,
        },
    ),
    "phi3": ("Phi3Config", {"head_dim": None}),
    "gpt_neox": ("GPTNeoXConfig", {"head_dim": None, "num_key_value_heads": None}),
    "falcon": ("FalconConfig", {"head_dim": None, "num_key_value_heads": None}),
    "falcon_new": (
        "FalconConfig",
        {
            "head_dim": None,
            "num_key_value_heads": None,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "head_dim": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
            **MAMBA,
        },
    ),
    "bamba": ("BambaConfig", {"head_dim": None, "attn_layer_indices": [1], **MAMBA}),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 64, **MAMBA}),
    "lfm2": (
        "Lfm2Config",
        {"head_dim": None, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "head_dim": None,
            "layer_types": ["conv", "full_attention"],
            "num_experts": 4,
            "num_dense_layers": 1,
            **MOE,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    ),
    "jamba": (
        "JambaConfig",
        {
            "head_dim": None,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "num_hidden_layers": None,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 16,
            **MOE,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_experts": 4, "shared_expert_intermediate_size": 16, **LINEAR_ATTENTION, **MOE},
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
}


def make_architecture(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of two layers, whose weights are wide enough for logits to differ."""
    kind, own = CONFIGS[name]
    common = {"num_hidden_layers": 2, "tie_word_embeddings": False}
    shape = small_shape(**{**common, **own, **changes})
    config = getattr(transformers, kind)(**{k: v for k, v in shape.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()
