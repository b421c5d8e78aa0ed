"""The data that a recipe of `safegene init` names, as each command wants it named."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.validation import repository
from ..data.sources import FILES, check_there, parts_of
from ..errors import ConfigError
from ..text import printable, read_json


# what this repository prepares for all families
_PREPARED = "build/smollm2-135m"
SHARED = {
    "command": "python recipes/smollm2-135m/prepare.py --data-only",
    "degrade": f"{_PREPARED}/degrade.jsonl",
    "harmful": f"{_PREPARED}/safety_prompts.jsonl",
    "benign": f"{_PREPARED}/benign_prompts.jsonl",
}
EXAMPLE = "trl-lib/Capybara"
_LONGEST_ROW = 2**20  # characters
_KINDS = {".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TrainingData:
    """What a training reads.

    Attributes:
        source: File, folder or hub id, as `data.task_data` has it.
        keys: The same as keys of a recipe of `safegene sft`.
        comment: Lines for the recipe.
        shared: Whether it is what this repository prepares for all families.
    """

    source: str
    keys: Mapping[str, Any]
    comment: str = ""
    shared: bool = False


def fine_tuning_data(given: str | None) -> TrainingData:
    """What fine-tunes are trained on: the example of the other recipes where nothing is given."""
    if given is not None:
        keys = _keys(given, "--data")
        check_columns(given, "--data")
        return TrainingData(given, keys)
    comment = "# An example: name the data of your fine-tune here, and in apply.yaml.\n"
    return TrainingData(EXAMPLE, _keys(EXAMPLE, "--data"), comment)


def degrading_data(given: str | None) -> TrainingData:
    """What the degraded model is trained on: harmless word puzzles where nothing is given."""
    if given is not None:
        keys = _keys(given, "--degrade_data")
        check_columns(given, "--degrade_data")
        return TrainingData(given, keys)
    shared = SHARED["degrade"]
    return TrainingData(shared, _of_file(shared), shared=True)


def prompts(given: str | None, option: str, kind: str) -> str:
    """The prompts of a kind that a vector is made with."""
    if given is None:
        return SHARED[kind]
    check_named(given, option)
    return given


def check_named(source: str, option: str) -> None:
    """Raises `SafeGeneError` for what is no file of a kind that is read, no folder, and no name on
    the hub.
    """
    path = Path(source)
    check_there(source)
    if path.is_dir():
        return
    if path.is_file():
        if path.suffix not in FILES:
            raise ConfigError(
                f"`{option}` is {source}, which ends in none of {', '.join(sorted(FILES))}: save the data as one of these."
            )
        return
    try:
        repository(parts_of(source, "train")[0])
    except ValueError as error:
        raise ConfigError(
            f"`{option}` is {source}, which is no file or folder here and no name on the hub: check its path."
        ) from error


def check_columns(source: str, option: str) -> None:
    """Raises `ConfigError` for a text file whose first row has none of the columns that a training
    reads, or whose cells stand between tabs, where it reads none. What cannot be read here is left to the training's own check.
    """
    path = Path(source)
    if not path.is_file():
        return
    if path.suffix == ".tsv":
        raise ConfigError(
            f"`{option}` is {source}, and a training reads no cells between tabs: save it as CSV or JSON lines."
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                found = next(csv.reader(file))
            elif path.suffix == ".jsonl":
                found = list(read_json(file.readline(_LONGEST_ROW)))
            else:
                return
    except (OSError, ValueError, RecursionError, StopIteration, csv.Error, TypeError):
        return
    if found and not {"prompt", "messages", "conversations", "text", "input_ids"} & set(found):
        named = ", ".join(f"`{printable(name)}`" for name in found[:8])
        raise ConfigError(
            f"`{option}` is {source}, which has the columns {named}: name those of questions and answers `prompt` and `completion`, one "
            "of conversations `messages`, or one of plain text `text`."
        )


def _keys(source: str, option: str) -> dict[str, Any]:
    check_named(source, option)
    path = Path(source)
    if path.is_file():
        return _of_file(source)
    if path.is_dir():
        return {"dataset_name": source}
    name, config, split = parts_of(source, "train")
    found = {"dataset_name": name}
    if config is not None:
        found["dataset_config"] = config
    return found | ({"dataset_train_split": split} if split != "train" else {})


def _of_file(source: str) -> dict[str, Any]:
    kind = _KINDS.get(Path(source).suffix, "json")
    return {"datasets": [{"path": kind, "data_files": source, "split": "train"}]}
