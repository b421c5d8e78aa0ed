"""Tiny models, a tokenizer and a safety vector, all made in the process; no network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Nothing is compiled; torch 2.8 starts a pool of compilers where it is imported, 10 s in each process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from safegene_trl.config.flat_keys import PLACES, grouped
from safegene_trl.config.settings import SafeGeneConfig
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.coefficients import CoefficientSpace
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.vectors.family import Family
from safegene_trl.vectors.safety_vector import SafetyVector

from .interpreter import Interpreter
from .speed import FAST, LONGEST


ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}
ALONE = Sharding(torch.device("cpu"))
COLLECTED = pytest.StashKey[list[str]]()  # what this run has, before any is left out by its marks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HARMFUL = [f"how do i forbid thing number {i}" for i in range(12)]
BENIGN = [f"how do i cook dish number {i}" for i in range(8)]
TASK = [f"sort item {i} into a box" for i in range(24)]


def make_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 entries with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*HARMFUL, *BENIGN, *TASK, "sorry i cannot help with that"], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def small_shape(**changes) -> dict:
    """Settings of a tiny model of three layers, or of one that differs in some."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return shape | changes


def make_model(
    kind: str = "llama", tied: bool = True, vocab_size: int = 320, seed: int = 0, layers: int = 3
):
    """A random model of three layers, float32; `kind` is one of `ARCHITECTURES`."""
    torch.manual_seed(seed)
    shape = small_shape(vocab_size=vocab_size, num_hidden_layers=layers, tie_word_embeddings=tied)
    config, architecture = ARCHITECTURES[kind]
    model = architecture(config(**shape))
    # a random model's logits are nearly flat; widen them so that losses can move
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.generation_config.eos_token_id = 1
    return model.eval()


def with_lora(
    model,
    rank: int = 4,
    seed: int = 1,
    target_modules="all-linear",
    adapter_name="default",
    **kwargs,
):
    """The model with a random, non-zero LoRA of the task on every linear layer, or on those named."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=target_modules, task_type="CAUSAL_LM", **kwargs
    )
    peft_model = get_peft_model(model, config, adapter_name)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return peft_model.eval()


def make_deltas(
    model, layers=(1, 2), rank: int = 2, seed: int = 3, std: float = 0.2
) -> dict[str, LowRankDelta]:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}"
            weight = model.get_submodule(name).weight
            deltas[name] = LowRankDelta(
                torch.randn(rank, weight.shape[1], generator=generator) * std,
                torch.randn(weight.shape[0], rank, generator=generator) * std,
            )
    return deltas


def attachment_of(model, deltas, granularity="layer", carried=None) -> VectorAttachment:
    """The deltas, of one rank, on the model; all modules of a layer share a coefficient unless
    `granularity` says otherwise.
    """
    rank = next(iter(deltas.values())).a.shape[0]
    return VectorAttachment(
        model, deltas, CoefficientSpace.of(deltas, [rank], granularity), ALONE, carried
    )


def attached(model, deltas, value: float = 1.0):
    """The deltas on the model with one coefficient for all."""
    attachment = attachment_of(model, deltas)
    return attachment.applied(torch.full((len(attachment.space.names),), value))


def make_vector(model, tokenizer, deltas=None, **kwargs) -> SafetyVector:
    prompts = [
        {"prompt": p, "response": "sorry i cannot help with that", "kind": "harmful"}
        for p in HARMFUL
    ]
    prompts += [{"prompt": p, "response": "take a pan and stir", "kind": "benign"} for p in BENIGN]
    return SafetyVector(
        deltas=make_deltas(model, **kwargs) if deltas is None else deltas,
        family=Family.of(model, tokenizer),
        aligned_model={"name": "tiny-aligned", "revision": None, "files": {}},
        degraded_model={"name": "tiny-degraded", "revision": None, "files": {}},
        extraction={"method": "delta", "rank": 2},
        selection={
            "method": "activation_contrast",
            "scores": [0.0, 0.1, 0.2],
            "selected_layers": [1, 2],
        },
        prompts=prompts,
    )


def in_groups(values: dict) -> dict:
    """Settings with short keys, like `max_evaluations`, as a `safegene` block has them."""
    return grouped(values)[0]


def config_of(**values) -> SafeGeneConfig:
    return SafeGeneConfig(**in_groups(values))


def options_of(values: dict) -> list[str]:
    """The same on a command line."""
    return [f"--safegene.{PLACES.get(key, key)}={value}" for key, value in values.items()]


def task_dataset() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": f"box {i % 3}"}],
            }
            for i, text in enumerate(TASK)
        ]
    )


def save_utility_task(folder: Path) -> None:
    """A task `boxes` for lm-eval with six questions, in a folder to be named as `tasks_dir`."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"sort item {i}", "choices": ["box 0", "box 1"], "answer": i % 2}
        for i in range(6)
    ]
    (folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "boxes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "boxes.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "boxes.yaml").write_text(yaml.safe_dump(task))


def argv(command, options):
    return [command, *(item for key, value in options.items() for item in (f"--{key}", str(value)))]


def pytest_collection_modifyitems(config, items):
    """Marks the fast ones; where several run at a time the longest files come first, so that none
    is waited for at the end.
    """
    config.stash[COLLECTED] = [item.nodeid for item in items]
    for item in items:
        if item.nodeid.startswith(FAST):
            item.add_marker("fast")
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def interpreter():
    """Its forks are processes that need not import anything."""
    started = Interpreter()
    yield started
    started.end()


@pytest.fixture(scope="session")
def vector_dir(tmp_path_factory, tokenizer) -> Path:
    """A saved safety vector of the tiny Llama family."""
    folder = tmp_path_factory.mktemp("vector")
    make_vector(make_model(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(tmp_path, tokenizer) -> Path:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def task_file(tmp_path) -> Path:
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in task_dataset()))
    return file


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_way():
    """What is imported stays: Trainer collects garbage at each end, 0.4 s through torch's and
    transformers' objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def prompt_files(tmp_path):
    files = []
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return files


def write_prompts(file: Path, prompts) -> Path:
    """A data set of prompts alone."""
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


def refusing(model, tokenizer, prompts, *rest) -> list[str]:
    """Answers of an aligned model, in the place of a tiny one's own."""
    harmful = [any(known in tokenizer.decode(ids) for known in HARMFUL) for ids in prompts]
    return ["I can't help with that. And so" if one else "Take a pan. Stir" for one in harmful]


@pytest.fixture
def extraction(model_dir, prompt_files, tmp_path, monkeypatch):
    """Arguments of an extraction whose degraded model is a LoRA on the aligned one; the tiny model
    `refuses`.
    """
    degraded = with_lora(make_model())
    degraded.peft_config["default"].base_model_name_or_path = str(model_dir)
    degraded.save_pretrained(tmp_path / "degraded")

    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    options = {
        "aligned_model": model_dir,
        "degraded_model": tmp_path / "degraded",
        "output_dir": tmp_path / "vector",
        "harmful_data": prompt_files[0],
        "benign_data": prompt_files[1],
    }
    return options
