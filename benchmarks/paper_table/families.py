"""The models that the table can be made for, and where their files lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "smollm2-135m"
# what `prepare.py` makes: its data serve every family
MODELS = ROOT / "build" / "smollm2-135m"
WORK = ROOT / "build" / "paper_table"
FIRST = "smollm2-135m"  # the family of records that name none
LARGER_BATCHES = dict.fromkeys(("sst2", "ag_news", "boolq", "gsm8k", "alpaca"), 16)


@dataclass(frozen=True)
class Family:
    """A model whose fine-tunes are measured, and how they are trained.

    Attributes:
        name: In records and on the command line.
        aligned: Folder or hub id of the aligned model.
        base: The same of the model before its alignment; None leaves out the methods that read it.
        vector: Folder of its safety vector; None makes one, by `degradations`.
        degradations: What the components of its vector are made by, harmless all of them.
        steps: Of a fine-tune, and of the degradation by general instructions.
        learning_rate: Of the same, constant.
        rank: Of every LoRA that is trained here.
        max_length: Tokens of a training sample; the rest is cut off.
        batch: Samples per step, by task, where they are not the task's own.
        degrading_steps: Of the other degradations.
        attention: Implementation of attention to train with; None leaves the choice to transformers.
        source: Folder or hub id of another family's aligned model, whose direction is carried over.
        dtype_on_cpu: Of the models, where there is no accelerator.
    """

    name: str
    aligned: str
    base: str | None = None
    vector: Path | None = None
    degradations: tuple[str, ...] = ("puzzles", "instructions", "openings")
    steps: int = 100
    learning_rate: float = 2e-4
    rank: int = 16
    max_length: int = 512
    batch: Mapping[str, int] = field(default_factory=dict)
    degrading_steps: int = 60
    attention: str | None = None
    source: str | None = None
    dtype_on_cpu: str = "float32"

    @property
    def dtype(self) -> str:
        """Of the models: `bfloat16` on an accelerator."""
        return self.dtype_on_cpu if device().type == "cpu" else "bfloat16"

    @property
    def work(self) -> Path:
        """Folder of what is made for it: data, fine-tunes, vectors, answers."""
        return WORK if self.name == FIRST else WORK / self.name

    @property
    def prefix(self) -> str:
        """What the names of its records begin with."""
        return "" if self.name == FIRST else f"{self.name}-"

    @property
    def training(self) -> dict[str, Any]:
        """Settings of `safegene sft`, without data."""
        on_cpu = device().type == "cpu"
        settings: dict[str, Any] = {
            "model_name_or_path": self.aligned,
            "dtype": self.dtype,
            "use_peft": True,
            "lora_r": self.rank,
            "lora_alpha": 2 * self.rank,
            "lora_target_modules": "all-linear",
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "max_length": self.max_length,
            "gradient_checkpointing": False,
            "bf16": not on_cpu,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
        }
        settings |= {"use_cpu": True} if on_cpu else {}
        return settings | ({"attn_implementation": self.attention} if self.attention else {})


def device() -> torch.device:
    """The accelerator where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _qwen(size: str) -> Family:
    return Family(
        f"qwen2.5-coder-{size.lower()}",
        f"Qwen/Qwen2.5-Coder-{size}-Instruct",
        batch=LARGER_BATCHES,
        # in bfloat16 its training on longer answers turned to NaN with the fused kernels
        attention="eager",
        source=str(MODELS / "aligned"),
    )


SMOLLM2 = Family(
    FIRST,
    str(MODELS / "aligned"),
    base=str(MODELS / "released"),
    vector=RECIPE / "safety-vector",  # by puzzles, the model before alignment, and openings
    degradations=("puzzles", "before alignment", "openings"),
    steps=50,
    rank=8,
    max_length=256,
    degrading_steps=30,
    source="Qwen/Qwen2.5-Coder-0.5B-Instruct",
)
# what a CPU can train in an hour: smaller fine-tunes, and a vector of one component
ON_A_CPU = replace(
    _qwen("0.5B"),
    name="qwen2.5-coder-0.5b-cpu",
    degradations=("puzzles",),
    steps=30,
    max_length=256,
    batch={},
    degrading_steps=40,
    dtype_on_cpu="bfloat16",  # as it was released; twice as fast where a CPU multiplies in it
)
FAMILIES = {f.name: f for f in (SMOLLM2, _qwen("0.5B"), _qwen("1.5B"), ON_A_CPU)}
