"""A tokenizer of SentencePiece as it is released: `tokenizer.model` and `tokenizer.json`."""

import json
import random
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer

from .conftest import BENIGN, CHAT_TEMPLATE, HARMFUL, TASK


SPECIAL = ["<unk>", "<s>", "</s>"]


def save_pieces(folder: Path, size: int = 400) -> None:
    """Pieces with a fallback to bytes, `<s>` before every text, and a config as version 4 wrote
    it.
    """
    words = " ".join([*HARMFUL, *BENIGN, *TASK]).split()
    chance = random.Random(0)
    lines = (" ".join(chance.choices(words, k=8)) for _ in range(2000))
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    backend = LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    fast = Tokenizer.from_str(backend)
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(folder / "tokenizer.json"))
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",  # else a trainer takes another one
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(number): {"content": token, "special": True, **plain}
            for number, token in enumerate(SPECIAL)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
