"""`safegene init MODEL`: the recipe of a model family, with settings that fit the model's size and the
machine.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.atomic_writes import check_new, write_new_files
from ..checkpoints.contents import check_no_link
from ..config.settings import SafeGeneConfig
from ..config.validation import Rule, check_value, folder
from ..distributed.memory import gpu_bytes
from ..errors import ConfigError
from ..step.plan import read_vector
from ..text import printable
from ..vectors.files import CONFIG_FILE
from .init_data import EXAMPLE, SHARED, degrading_data, fine_tuning_data, prompts
from .init_files import Family, files_of, gib
from .init_model import FoundModel, find_model
from .init_plan import ASSUMED_GPU, SMALL, Machine, Plan, plan_for
from .output import give
from .plain_parser import PlainParser


_GIB = 2**30
_LONGEST_NAME = 255
MOST_GIB = 10**5
# how releases of chat models end, e.g. Qwen2.5-7B-Instruct, gemma-2-9b-it, Mistral-7B-Instruct-v0.3
_RELEASE = re.compile(r"-(instruct|chat|it)(-.*)?$")
_NEEDS_PLAIN_TEXT = (
    "The tokenizer of {name} has no chat template, so it is likely a base model, which refuses nothing: name the chat release of "
    "the family, or name plain text (a column `text`, or `prompt` and `completion`) with {options}."
)


def main(argv: Sequence[str]) -> int:
    """Writes the files and says what was found and chosen; with `--dry_run` it prints them only."""
    arguments = _parser().read(argv)
    _check(arguments)
    target = Path(arguments.output_dir or f"recipes/{family_name(arguments.model)}")
    check_no_link(target)
    model = find_model(arguments.model, arguments.revision)
    family, machine = _family(arguments, target, model)
    files = files_of(family)
    if arguments.dry_run:
        check_new(target, files)
    else:
        write_new_files(target, files)
    told = _told(family, machine)
    record = {"folder": str(target), "written": not arguments.dry_run, "files": files}
    record |= {"model": model.name, "chosen": told[1], "notes": told[2:]}
    if arguments.dry_run:
        shown = [f"\n==> {target / name} <==\n{text}".rstrip("\n") for name, text in files.items()]
        told += [*shown, "\nDry run: nothing was written."]
    else:
        told.append(f"Written to {target}: {', '.join(files)}")
        told.append(f"Next: the commands in {target / 'README.md'}, in their order.")
    give(record, "\n".join(told))
    return 0


def family_name(model: str) -> str:
    """The name of a family's folder: the model's own in small letters, without what says that it is
    a chat release.
    """
    own = Path(os.path.abspath(model) if Path(model).is_dir() else model).name
    name = re.sub(r"[^a-z0-9._-]+", "-", own.lower()).strip("-.")
    return _RELEASE.sub("", name) or "model"


def _parser() -> PlainParser:
    parser = PlainParser(
        prog="safegene init",
        description="Write the recipe of a model family: what makes its safety vector, and what fine-tunes with it. The model's "
        "weights are not read. Files that are there are never replaced.",
    )
    parser.add_argument("model", help="The family's aligned model: directory or hub id.")
    parser.add_argument("--revision", help="Its branch, tag or commit on the hub.")
    parser.add_argument(
        "--output_dir", help="Folder for the files. Default: recipes/ and the family's name."
    )
    parser.add_argument(
        "--build_dir",
        help="Folder for what the commands make. Default: build/ and the name of the files' folder.",
    )
    parser.add_argument(
        "--vector",
        help="The family's safety vector, directory or hub id: the steps that make one are left out. Default: the one in the "
        "files' folder, where one lies there.",
    )
    parser.add_argument(
        "--data",
        help="What fine-tunes are trained on: a file, a folder, or a hub id (`ID:CONFIG@SPLIT`). Default: an example from the hub.",
    )
    parser.add_argument(
        "--degrade_data",
        help="Harmless data that the degraded model is trained on. Default: the word puzzles of this package's repository.",
    )
    for kind in ("harmful", "benign"):
        parser.add_argument(
            f"--{kind}_data",
            help=f"{kind.capitalize()} prompts without answers, in a column `prompt`. Default: those of this package's repository.",
        )
    parser.add_argument("--num_gpus", type=int, help="GPUs to use, 0 for a CPU. Default: all here.")
    parser.add_argument(
        "--gpu_memory", type=float, help="GiB of each. Default: the smallest here, else 80."
    )
    parser.add_argument("--dry_run", action="store_true", help="Print the files, write nothing.")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for an option that cannot be meant."""
    places = ("output_dir", "build_dir")
    for name, value in vars(arguments).items():
        if name in ("num_gpus", "gpu_memory", "dry_run"):
            continue
        rule = Rule(syntax=folder if name in places else None)
        shown = name if name == "model" else f"--{name}"
        check_value(shown, value, str | None, rule)
        _check_written_out(shown, value or "")
    check_value("--num_gpus", arguments.num_gpus, int | None, Rule(at_least=0, at_most=4096))
    check_value("--gpu_memory", arguments.gpu_memory, float | None, Rule(above=0, at_most=MOST_GIB))
    if arguments.num_gpus == 0 and arguments.gpu_memory is not None:
        raise ConfigError(
            "`--num_gpus` is 0 and `--gpu_memory` is set: leave out one, as a CPU has none."
        )


def _check_written_out(shown: str, value: str) -> None:
    """Raises `ConfigError` for what cannot stand in a line of a recipe, or be a file's name."""
    if printable(value) != value:
        raise ConfigError(
            f"`{shown}` is {value!r}, which holds a character that cannot be seen: rename it."
        )
    if max(map(len, map(os.fsencode, value.split("/")))) > _LONGEST_NAME:
        raise ConfigError(
            f"`{shown}` has a part of more than {_LONGEST_NAME} bytes, which no file's name has: shorten it."
        )


def _family(
    arguments: argparse.Namespace, target: Path, model: FoundModel
) -> tuple[Family, Machine]:
    vector = arguments.vector or _vector_in(target)
    if vector is not None:
        read_vector(SafeGeneConfig(vector=vector), model.skeleton, model.tokenizer)
        for option in ("degrade_data", "harmful_data", "benign_data"):
            if getattr(arguments, option) is not None:
                raise ConfigError(
                    f"`--{option}` is for the making of a vector, and there is one, {vector}: leave it out."
                )
    elif (arguments.harmful_data is None) != (arguments.benign_data is None):
        raise ConfigError(
            "Only one of `--harmful_data` and `--benign_data` is set: set both, or neither."
        )
    _check_template(model, arguments, vector)
    machine = _machine(arguments, model.sizes.parameters)
    family = Family(
        folder=target,
        build=Path(arguments.build_dir or f"build/{target.name}"),
        model=model,
        plan=plan_for(model.name, model.sizes, model.experts > 0, machine),
        data=fine_tuning_data(arguments.data),
        degrading=degrading_data(arguments.degrade_data),
        harmful=prompts(arguments.harmful_data, "--harmful_data", "harmful"),
        benign=prompts(arguments.benign_data, "--benign_data", "benign"),
        vector=vector,
    )
    return family, machine


def _check_template(model: FoundModel, arguments: argparse.Namespace, vector: str | None) -> None:
    """Raises `ConfigError` where conversations would meet a tokenizer without a chat template."""
    wanted = ["--data"] if vector else ["--data", "--degrade_data"]
    missing = [option for option in wanted if getattr(arguments, option[2:]) is None]
    if missing and not model.has_template:
        options = " and ".join(f"`{option}`" for option in missing)
        raise ConfigError(_NEEDS_PLAIN_TEXT.format(name=model.name, options=options))


def _vector_in(target: Path) -> str | None:
    """The vector that lies in the files' folder, None where there is none."""
    found = sorted(path.parent for path in target.glob(f"*/{CONFIG_FILE}"))
    if len(found) > 1:
        raise ConfigError(
            f"{target} holds several safety vectors ({', '.join(path.name for path in found)}): name one of them as `--vector`."
        )
    return str(found[0]) if found else None


def _machine(arguments: argparse.Namespace, parameters: int) -> Machine:
    """Where the recipe is to run: what was said of it, else what is here."""
    here = gpu_bytes()
    count, memory = arguments.num_gpus, arguments.gpu_memory
    if count == 0 or (count is None and memory is None and not here and parameters <= SMALL):
        return Machine(0, 0)
    size = min(here, default=ASSUMED_GPU) if memory is None else int(memory * _GIB)
    return Machine(len(here) or 1 if count is None else count, size, memory is None and not here)


def _told(family: Family, machine: Machine) -> list[str]:
    """What was found and chosen, a line each."""
    plan = family.plan
    lines = [f"{family.model.name}: {family.model.describe()}", _chosen(plan, machine)]
    if plan.four_bit:
        lines.append(
            "QLoRA needs bitsandbytes, the extra `qlora`. Its safety step measures on the base in 4 bits and writes the 16-bit model."
        )
    if plan.launch.sharded or plan.reading.sharded:
        lines.append("ZeRO-3 needs DeepSpeed, the extra `deepspeed` of this package.")
    if family.vector is not None:
        lines.append(
            f"The vector {family.vector} fits the model: no step that makes one is written."
        )
    elif not Path(SHARED["harmful"]).exists() and (
        family.degrading.shared or not family.own_prompts
    ):
        lines.append(
            f"Data for the vector is read from build/smollm2-135m, which is not here yet: run `{SHARED['command']}` in a clone of "
            "this package, or name your own with --degrade_data, --harmful_data and --benign_data."
        )
    if family.data.comment:
        lines.append(f"No --data was named: sft.yaml and apply.yaml name {EXAMPLE} as an example.")
    return lines


def _chosen(plan: Plan, machine: Machine) -> str:
    training = plan.fine_tune
    if plan.cpu:
        where = "a CPU"
    else:
        many = plan.launch.processes > 1
        where = f"{plan.launch.processes if many else 'one'} GPU{'s' if many else ''} of {machine.memory / _GIB:.3g} GiB"
        where += " (none was found here, and --gpu_memory is not set)" if machine.assumed else ""
        where += ", weights shared out by ZeRO-3" if plan.launch.sharded else ""
    return (
        f"Chosen: {plan.method} of rank {training.rank} in {plan.dtype} on {where}; {training.samples} × {training.accumulation} samples of "
        f"{training.length} tokens a step, about {gib(training.memory)}"
        + (" for each process" if plan.launch.processes > 1 else "")
    )
