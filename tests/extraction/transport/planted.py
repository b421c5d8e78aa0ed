"""Models of two architectures, widths, depths and tokenizers that have the same in mind of a text.

Every token has a place `z` of unit length in a space of `LATENT` dimensions. A model embeds it as `A z`
with orthonormal columns of its own, its first layer adds the mean over the tokens so far to each
place, and the layers after that add nothing. So the state of a prompt in one model is a fixed linear
image of that in the other, and a direction `A c` of one is `A' c` of the other.
"""

import json
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safegene_trl.models.low_rank import LowRankDelta

from ...conftest import BENIGN, HARMFUL, make_tokenizer, small_shape, write_prompts


LATENT = 12
WORDS = """
    sun tree river stone bread table cloud music paper garden winter orange silver window quiet
    jazz vivid maple fox lamp hedge kettle yellow bridge pond crown velvet owl thick zebra
"""


def anchors(count: int = 200, seed: int = 0) -> list[str]:
    """Benign sentences, no two alike, and without numbers, which the two tokenizers cut otherwise."""
    generator, known = torch.Generator().manual_seed(seed), WORDS.split()
    found: dict[str, None] = {}
    while len(found) < count:
        words = [known[i] for i in torch.randint(len(known), (7,), generator=generator).tolist()]
        found.setdefault(" ".join(words))
    return list(found)


def frame(width: int, seed: int) -> torch.Tensor:
    """Orthonormal rows, `LATENT`×width."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, LATENT, generator=generator))[0].T


def source_tokenizer():
    return make_tokenizer()


def target_tokenizer():
    """The same pieces under other ids."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    last = len(tokenizer) - 1
    content["model"]["vocab"] = {
        piece: last - index for piece, index in content["model"]["vocab"].items()
    }
    for added in content["added_tokens"]:
        added["id"] = last - added["id"]
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    found.chat_template = tokenizer.chat_template
    return found


def places(tokenizer) -> torch.Tensor:
    """`z` of every token, by what it spells."""
    rows = torch.zeros(len(tokenizer), LATENT)
    for token, index in tokenizer.get_vocab().items():
        generator = torch.Generator().manual_seed(crc32(token.encode()))
        row = torch.randn(LATENT, generator=generator)
        rows[index] = row / row.norm()
    return rows


def planted_model(kind: str, tokenizer, width: int, layers: int, seed: int):
    """A model that has of a prompt what all others of this module have, in a frame of its own."""
    config, architecture = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    heads = width // 8
    shape = small_shape(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = architecture(config(**shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(places(tokenizer) @ frame(width, seed))
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                part.weight.zero_()
                if part.bias is not None:
                    part.bias.zero_()
            attention.o_proj.weight.zero_()
            if index == 0:
                attention.v_proj.weight.copy_(torch.eye(width))
                attention.o_proj.weight.copy_(torch.eye(width))
    return model


def save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planted_delta(model, tokenizer, seed: int) -> tuple[dict[str, LowRankDelta], torch.Tensor]:
    """A vector that adds one direction where a prompt speaks of forbidding, and its `c`."""
    # small: where it reaches anchors, too, no rotation takes one model to the other
    c = 0.1 * torch.randn(LATENT, generator=torch.Generator().manual_seed(99))
    basis = frame(model.config.hidden_size, seed)
    ids = tokenizer(" forbid thing", add_special_tokens=False)["input_ids"]
    cook = tokenizer(" cook dish", add_special_tokens=False)["input_ids"]
    z = places(tokenizer)
    tells = (z[ids].mean(dim=0) - z[cook].mean(dim=0)) @ basis
    name = "model.layers.0.self_attn.o_proj"
    return {name: LowRankDelta(tells[None], (c @ basis)[:, None])}, c


def prompt_files(folder: Path) -> dict[str, Path]:
    """Files of prompts and anchors, as the settings call them."""
    return {
        "harmful_data": write_prompts(folder / "harmful.jsonl", HARMFUL),
        "benign_data": write_prompts(folder / "benign.jsonl", BENIGN),
        "anchor_data": write_prompts(folder / "anchors.jsonl", anchors()),
    }
