"""What is measured: models of a size with random weights (or somebody's own), vectors, and samples
of ordinary lengths.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.config.data import DataConfig
from safegene_trl.config.measure import MeasureConfig
from safegene_trl.config.search import SearchConfig
from safegene_trl.config.settings import SafeGeneConfig
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.vectors.family import Family
from safegene_trl.vectors.safety_vector import SafetyVector

from .rows import VECTORS, Row


ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Size:
    """Of a Llama, and of the fine-tune that it gets.

    Attributes:
        tokens: Of a training sample.
        batch: Training samples in one pass.
        passes: Of them in a training step.
        steps: Training steps.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    tokens: int = 1024
    batch: int = 8
    passes: int = 2
    steps: int = 6


SIZES = {
    "1b": Size(1536, 8960, 28, 12, 2, 151936, True),  # 1.5 B parameters
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False),  # 8.0 B
    "tiny": Size(32, 48, 4, 4, 2, 320, True, tokens=64, batch=2, passes=2, steps=4),
}
_TEXT = (
    "please explain in some detail how the item is to be kept on a shelf near that wall and "
    "which box it goes into when shop rooms are full sorry i cannot help with user assistant"
)
WORDS = tuple(_TEXT.split())
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] }} {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# takes what is known so far, so that a process that dies has told of it
Note = Callable[[dict[str, Any]], None]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# as few as show that every row runs
TINY = {
    "data": DataConfig(num_safety_shots=8, num_task_shots=8, num_benign_shots=8),
    "measure": MeasureConfig(num_test_prompts=8, max_new_tokens=4),
}


@dataclass(frozen=True)
class Given:
    """Attributes:
    model: A checkpoint of somebody's own; None for random weights.
    vector: Theirs for it; None for random ones.
    folder: For what is written meanwhile.
    """

    model: Path | None
    vector: Path | None
    folder: Path


def size_of(row: Row) -> Size:
    """Of a model of somebody's own, the fine-tune that the 1.5 B model gets."""
    return SIZES.get(row.size, SIZES["1b"])


def model_and_tokenizer(
    row: Row, path: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """On its device, in the data type that it is trained in."""
    if path is not None:
        return load_model(str(path)).to(DEVICE, DTYPE), load_tokenizer(str(path))
    size, tokenizer = size_of(row), make_tokenizer()
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model, tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, so that samples are as long as they are said to be."""
    named = ["<|pad|>", "<|end|>", "<|unknown|>", *WORDS]
    ids = {word: index for index, word in enumerate(dict.fromkeys(named))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(seed: int, words: int) -> str:
    """No two seeds give the same."""
    base = len(WORDS) - 2  # not the roles
    return " ".join(
        WORDS[(seed // base**i + 7 * i if i < 3 else seed + 5 * i) % base] for i in range(words)
    )


def vector_folder(
    row: Row, own: Path | None, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> Path:
    """Where the row's vector lies: somebody's own, or a random one that is put into `folder`."""
    if row.vector == "own" and own is not None:
        return own
    ranks, share = VECTORS[row.vector]
    layers = model.config.get_text_config().num_hidden_layers
    changed = set(range(layers - max(1, round(share * layers)), layers))
    generator = torch.Generator().manual_seed(1)

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    deltas = {
        name: LowRankDelta(
            factor(sum(ranks), module.in_features), factor(module.out_features, sum(ranks))
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(f".layers.{layer}." in name for layer in changed)
    }
    prompts = [
        {
            "prompt": text(i, 20),
            "response": "sorry i cannot help with that" if i % 2 else text(i + 1, 20),
            "kind": "harmful" if i % 2 else "benign",
        }
        for i in range(256)
    ]
    origin = {"name": "random", "revision": None, "files": {}}
    made = {"method": "delta", "rank": sum(ranks), "components": list(ranks)}
    selected = {"method": "all", "scores": [0.0] * layers, "selected_layers": sorted(changed)}
    family = Family.of(model, tokenizer)
    vector = SafetyVector(deltas, family, origin, origin, made, selected, prompts)
    vector.save_pretrained(folder / "vector")
    return folder / "vector"


def task(row: Row) -> Dataset:
    """Enough samples for the fine-tune, the shots and the measurement."""
    size = size_of(row)
    count = max(256, size.steps * size.batch * size.passes)
    asked = 3 * size.tokens // 8
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": text(i, asked)}],
                "completion": [
                    {"role": "assistant", "content": text(3 * i + 1, size.tokens - asked - 8)}
                ],
            }
            for i in range(count)
        ]
    )


def settings(row: Row, vector: Path, output: Path) -> SafeGeneConfig:
    """The defaults, but that what a random vector does to random weights may be anything."""
    config = SafeGeneConfig(
        vector=str(vector),
        allow_other_base=True,
        search=SearchConfig(max_utility_loss=1e9),
        **TINY if row.size == "tiny" else {},
    )
    config.output.output_dir = str(output)
    return config


def now() -> float:
    """Seconds, when the device has done all it was told to."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()
