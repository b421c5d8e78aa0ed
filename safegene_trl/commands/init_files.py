"""The files that `safegene init` writes: YAML with the comments that say what it is for, and a page
with the commands in order.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..estimation.cost import Launch
from ..text import code, markdown
from .init_data import SHARED, TrainingData
from .init_model import FoundModel
from .init_plan import Plan, Training
from .launch_option import OPTION
from .yaml_files import as_yaml


README = "README.md"


@dataclass(frozen=True)
class Family:
    """What a family's files are written from.

    Attributes:
        folder: Where they go.
        build: Where what the commands make goes.
        model: The aligned model.
        plan: How it is trained.
        data: What fine-tunes are trained on.
        degrading: What the degraded model is trained on.
        harmful: Harmful prompts.
        benign: Benign prompts.
        vector: The family's vector, None where one is to be made.
    """

    folder: Path
    build: Path
    model: FoundModel
    plan: Plan
    data: TrainingData
    degrading: TrainingData
    harmful: str
    benign: str
    vector: str | None

    @property
    def vector_place(self) -> str:
        """The vector that is there, or will be."""
        return self.vector or str(self.build / "safety-vector")

    @property
    def own_prompts(self) -> bool:
        """Whether prompts are those that this repository has for all families."""
        return self.harmful != SHARED["harmful"]

    def command(self, name: str, file: str) -> str:
        """The command that takes a file of the recipe."""
        launch = self.plan.launch if name == "sft" else self.plan.reading
        words = ["safegene", name, "--config", str(self.folder / file)]
        return shlex.join(words + _launching(launch))


def files_of(family: Family) -> dict[str, str]:
    """The text of every file of a family's recipe, by its name."""
    made = (
        {}
        if family.vector
        else {"degrade.yaml": _degrade(family), "extract.yaml": _extract(family)}
    )
    made |= {"sft.yaml": _sft(family), "apply.yaml": _apply(family)}
    return made | {README: _readme(family)}


def _launching(launch: Launch) -> list[str]:
    if launch.processes == 1:
        return []
    kind = "zero3" if launch.sharded else "ddp"
    return [OPTION, kind, "--num_processes", str(launch.processes)]


def _text(*parts: str | Mapping[str, Any]) -> str:
    """A YAML text of blocks of keys and comments."""
    return "".join(part if isinstance(part, str) else as_yaml(part) for part in parts if part)


def _head(family: Family, what: str, name: str, file: str, *more: str) -> str:
    lines = [what, *more, f"Run: {family.command(name, file)}"]
    return "".join(f"# {line}\n" for line in lines)


def _where(plan: Plan, launch: Launch) -> str:
    if plan.cpu:
        return "On a CPU"
    if launch.processes == 1:
        return "One GPU"
    return f"{launch.processes} GPUs" + (", which share out the weights" if launch.sharded else "")


def gib(count: int) -> str:
    """Bytes in words, about."""
    return f"{count / 2**30:.1f} GiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"


def _trains(plan: Plan, training: Training) -> str:
    return f"{_where(plan, plan.launch)}, about {gib(training.memory)}{_each(plan.launch)}"


def _reads(plan: Plan) -> str:
    """Of what answers prompts: on a GPU it takes as many at once as there is room for."""
    return f"{_where(plan, plan.reading)}, {gib(plan.reading_memory)} or more{_each(plan.reading)}"


def _each(launch: Launch) -> str:
    return " each" if launch.processes > 1 else ""


def _model(family: Family) -> dict[str, Any]:
    found: dict[str, Any] = {"model_name_or_path": family.model.name}
    if family.model.revision is not None:
        found["model_revision"] = family.model.revision
    return found | {"dtype": family.plan.dtype}


def _lora(family: Family, training: Training) -> str:
    plan, targets = family.plan, family.model.targets
    named: str | list[str] = targets or "all-linear"
    if len(targets or ()) == 1:
        named = rf".*\.{named[0]}"  # TRL gives PEFT a list of one as a text, which is a pattern
    comment = ""
    if targets is not None:
        why = "that takes in a layer on which PEFT puts no LoRA."
        if family.model.experts:
            why = "that takes in the router, and no vector goes on such a LoRA."
        comment = f"# Not all-linear: {why}\n"
    quantized: dict[str, Any] = {}
    if plan.four_bit:
        quantized = {"load_in_4bit": True, "use_bnb_nested_quant": True}
    adapter = {"use_peft": True, "lora_r": training.rank, "lora_alpha": 2 * training.rank}
    return _text("\n", adapter, comment, {"lora_target_modules": named}, quantized, "\n")


def _batches(plan: Plan, training: Training) -> dict[str, Any]:
    found = {"per_device_train_batch_size": training.samples}
    if training.accumulation > 1:
        found["gradient_accumulation_steps"] = training.accumulation
    return found


def _precision(plan: Plan, training: Training) -> dict[str, Any]:
    found: dict[str, Any] = {"max_length": training.length, "gradient_checkpointing": not plan.cpu}
    found["bf16"] = not plan.cpu
    return found | ({"use_cpu": True} if plan.cpu else {})


def _degrade(family: Family) -> str:
    plan, training = family.plan, family.plan.degrading
    before = ["Before: " + SHARED["command"]] if family.degrading.shared else []
    steps = {"max_steps": 30 if plan.cpu else 60, **_batches(plan, training)}
    return _text(
        _head(
            family,
            "Step 1 of 3: a mildly degraded model, a LoRA on the aligned one. "
            f"{_trains(plan, training)}.",
            "sft",
            "degrade.yaml",
            *before,
        ),
        _model(family),
        family.degrading.keys,
        {"output_dir": str(family.build / "degraded")},
        _lora(family, training),
        steps,
        {"learning_rate": 3e-4 if plan.cpu else 2e-4, "lr_scheduler_type": "cosine"},
        {"warmup_steps": 5},
        _precision(plan, training),
        {"seed": 0, "logging_steps": 10, "save_strategy": "no", "report_to": "none"},
    )


def _extract(family: Family) -> str:
    plan, model = family.plan, family.model
    revision = {} if model.revision is None else {"aligned_revision": model.revision}
    prompts = (
        "# 96 harmful and 482 benign prompts. With data of your own up to 256 of each are taken."
    )
    if family.own_prompts:
        prompts = (
            "# Up to 256 harmful prompts and as many benign ones are taken, from a column `prompt`."
        )
    return _text(
        _head(
            family,
            "Step 2 of 3: the family's safety vector, of the aligned model and the degrading LoRA. "
            f"{_reads(plan)}.",
            "extract",
            "extract.yaml",
        ),
        {"aligned_model": model.name, **revision},
        {"degraded_model": str(family.build / "degraded"), "output_dir": family.vector_place},
        {"method": "delta"},
        "# All layers are kept. To keep those that score best, name another selection, e.g. `gradient`.\n",
        {"selection": "all", "dtype": plan.dtype},
        f"{prompts}\n"
        "# For the gate to measure on prompts of another source add test_harmful_data and test_benign_data.\n",
        {"harmful_data": family.harmful, "benign_data": family.benign},
    )


def _shots(family: Family) -> dict[str, Any]:
    if family.plan.cpu:
        return {"num_safety_shots": 24, "num_benign_shots": 12, "num_task_shots": 12}
    return {"num_safety_shots": 64, "num_task_shots": 64, "num_benign_shots": 64}


def _safegene(family: Family, **output: Any) -> str:
    """The block of a fine-tune, with the data of one that is finished."""
    task = {"task_data": output.pop("task_data")} if "task_data" in output else {}
    block: dict[str, Any] = {
        "vector": family.vector_place,
        "data": {**task, **_shots(family)},
        "output": {"output_format": "merged", **output},
    }
    if family.plan.cpu:
        block["search"] = {"max_evaluations": 8}
    return _text(
        "\n# The gate rejects a checkpoint that refuses less than you allow. Add to the block:\n"
        "#   gate: {min_refusal_rate: 0.8}\n",
        {"safegene": block},
    )


def _sft(family: Family) -> str:
    plan, training = family.plan, family.plan.fine_tune
    steps: dict[str, Any] = {"max_steps": 25} if plan.cpu else {"num_train_epochs": 1}
    kept = {"save_strategy": "no"} if plan.cpu else {"save_strategy": "epoch"}
    which = "" if family.vector else "Step 3 of 3: a"
    return _text(
        _head(
            family,
            f"{which or 'A'} fine-tune that takes the vector on. Repeat it for every fine-tune of the "
            f"family. {_trains(plan, training)}.",
            "sft",
            "sft.yaml",
            "Check first, without training: add --safegene.dry_run true",
        ),
        _model(family),
        family.data.comment,
        family.data.keys,
        {"output_dir": str(family.build / "fine-tuned")},
        _lora(family, training),
        steps,
        _batches(plan, training),
        {"learning_rate": 2e-4 if plan.cpu else 1e-4},
        {"lr_scheduler_type": "cosine", "warmup_steps": 5 if plan.cpu else 20},
        _precision(plan, training),
        {"seed": 0, "logging_steps": 10, **kept, "report_to": "none"},
        _safegene(family),
    )


def _apply(family: Family) -> str:
    plan = family.plan
    return _text(
        _head(
            family,
            "Instead of the step in sft.yaml: the same for a fine-tune that is finished. Name it here. "
            f"{_reads(plan)}.",
            "apply",
            "apply.yaml",
            "Check first, without a search: add --safegene.dry_run true",
        ),
        {"model_name_or_path": str(family.build / "fine-tuned"), "dtype": plan.dtype},
        _safegene(
            family,
            task_data=family.data.source,
            output_dir=str(family.build / "safeguarded"),
        ),
    )


def _rows(family: Family) -> list[tuple[str, str, str]]:
    """Command, what it makes, and what it takes, of every step in order."""
    plan = family.plan
    rows = []
    if family.vector is None:
        if family.degrading.shared:
            rows.append(
                (SHARED["command"], "prompts and data, in a clone of this package", "a minute")
            )
        rows += [
            (
                family.command("sft", "degrade.yaml"),
                "a LoRA that refuses less",
                _trains(plan, plan.degrading),
            ),
            (
                family.command("extract", "extract.yaml"),
                "the family's safety vector",
                _reads(plan),
            ),
        ]
    return [
        *rows,
        (
            family.command("sft", "sft.yaml"),
            "a fine-tune, and its safeguarded checkpoint",
            _trains(plan, plan.fine_tune),
        ),
        (
            family.command("apply", "apply.yaml"),
            "the same of a fine-tune that is finished",
            _reads(plan),
        ),
    ]


def _readme(family: Family) -> str:
    rows = _rows(family)
    table = "".join(
        f"| {number} | {markdown(makes)} | {markdown(takes)} |\n"
        for number, (_, makes, takes) in enumerate(rows, 1)
    )
    commands = "".join(
        f"{command}   # {number}\n" for number, (command, _, _) in enumerate(rows, 1)
    )
    return (
        f"# {markdown(family.folder.name)}\n\n"
        f"The recipe of {code(family.model.name)}, written by `safegene init`.\n"
        f"It is {markdown(family.model.describe())}.\n\n"
        f"```bash\n{commands}```\n\n"
        f"| step | makes | takes |\n| --- | --- | --- |\n{table}\n"
        "The memory is reckoned from the model's shapes and not measured. It is that of one process, for\n"
        "samples as long as `max_length` allows. `safegene estimate` in place of `safegene` tells what the\n"
        "last steps take, from short runs of their parts on this machine.\n"
    )
