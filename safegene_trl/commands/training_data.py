"""The training data of `safegene sft`: read, and held against what TRL's trainer will look for in
it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoProcessor
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig, get_dataset
from trl.data_utils import is_conversational, is_conversational_from_value, maybe_convert_to_chatml

from ..checkpoints.loading import UNREADABLE
from ..checkpoints.source import adapter_base
from ..errors import CalibrationDataError, ConfigError, UnsupportedModelError
from ..text import one_line


# What `load_dataset` reads files by, not data sets of these names; and the endings of their files.
_FORMATS = {"json": (".json", ".jsonl"), "csv": (".csv",), "parquet": (".parquet",)}
_FORMATS |= {"arrow": (".arrow",), "text": (".txt",)}


def training_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    """The splits that the recipe's `datasets`, or its `dataset_name`, stand for.

    Raises:
        ConfigError: The recipe names no data.
        CalibrationDataError: The data cannot be read.
    """
    if not mixture.datasets and not script.dataset_name:
        raise ConfigError("No training data is named: set `dataset_name` or `datasets`.")
    named = script.dataset_name
    if not mixture.datasets:
        _check_is_no_file(str(named))
    try:
        if mixture.datasets:
            named = ", ".join(str(each.path) for each in mixture.datasets)
            return get_dataset(mixture)
        return load_dataset(named, name=script.dataset_config, streaming=script.dataset_streaming)
    except Exception as error:  # datasets raises dozens of kinds; each means the same to the user
        raise CalibrationDataError(
            f"The data set {named} cannot be read: {_cause(error)}"
        ) from error


def _check_is_no_file(name: str) -> None:
    """Raises `CalibrationDataError`, with what to write instead, for a `dataset_name` that is a
    file, or a format of files.
    """
    path = Path(name)
    ending = path.suffix.lower()
    if path.is_file() and ending == ".tsv":
        raise CalibrationDataError(
            f"`dataset_name` is {name}, and a training reads no cells between tabs: save it as JSON lines, and write "
            f"`datasets: [{{path: json, data_files: {path.stem}.jsonl}}]` in the recipe."
        )
    kinds = [kind for kind, endings in _FORMATS.items() if ending in endings]
    if path.is_file():
        kind, files, what = (kinds or ["json"])[0], name, "a file"
    elif name in _FORMATS:
        kind, files, what = name, f"FILE{_FORMATS[name][-1]}", "a format of files"
    else:
        return
    raise CalibrationDataError(
        f"`dataset_name` is {what}, {name}, and must be a folder or a data set of the hub: leave it out, and write "
        f"`datasets: [{{path: {kind}, data_files: {files}}}]` in the recipe."
    )


def _cause(error: BaseException) -> str:
    """What an error says, and what led to it where it is one of datasets' that say no more than
    that there was one.
    """
    said = one_line(error)
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        said = f"{said}: {one_line(error.__cause__)}"
    return said


def split_of(splits: Mapping[str, Any], name: str, setting: str) -> Any:
    """The rows of a split; `setting` is the option that names it."""
    if name not in splits:
        raise CalibrationDataError(
            f"The training data has no split `{name}`: set `{setting}` to one of {', '.join(splits)}."
        )
    return splits[name]


def check_rows(rows: Any, what: str, training: SFTConfig, model: str, revision: str | None) -> None:
    """Tells before the model is loaded whether the trainer finds its columns and can read them, by
    the first row.

    Args:
        rows: Data set or stream.
        what: Names it in messages, e.g. `training data`.
        training: The trainer's settings.
        model: Directory or hub id of the model, whose tokenizer must have a chat template for
            conversations.
        revision: Its branch, tag or commit on the hub.

    Raises:
        CalibrationDataError: There is no row, or not the column that is read.
        UnsupportedModelError: The rows are conversations, and no chat template is to be had.
    """
    row = _first(rows, what)
    options = training.dataset_kwargs
    prepared = isinstance(options, dict) and options.get("skip_prepare_dataset", False)
    if prepared or any(column in row for column in ("input_ids", "image", "images")):
        return  # no column is looked for, or by a processor of images
    columns = ", ".join(f"`{column}`" for column in row)
    try:
        if is_conversational_from_value(row):
            row = maybe_convert_to_chatml(copy.deepcopy(row))
        chat = is_conversational(row)
    except IndexError as error:
        raise CalibrationDataError(
            f"The first row of the {what} holds a conversation without turns: remove such rows."
        ) from error
    if chat and ("messages" in row or {"prompt", "completion"} <= set(row)):
        _check_template(row, what, training, model, revision)
        return
    field = training.dataset_text_field
    read = ["prompt", "completion"] if "prompt" in row else ["messages" if chat else field]
    for column in (column for column in read if column not in row):
        said = (
            f"`dataset_text_field` is `{field}`"
            if column == field
            else f"the trainer reads `{column}`"
        )
        raise CalibrationDataError(
            f"The {what} has no column `{column}`, only {columns}, and {said}: name the columns of "
            "questions and answers `prompt` and `completion`, one of conversations `messages`, or set `dataset_text_field` to the "
            "column with the text."
        )
    for column in read:
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise CalibrationDataError(
                f"`{column}` in the first row of the {what} is no text but {kind}: give text, or conversations as lists "
                "of turns with `role` and `content`."
            )


def _first(rows: Any, what: str) -> dict[str, Any]:
    try:
        row = next(iter(rows), None)
    except Exception as error:  # a stream opens its files only now
        raise CalibrationDataError(f"The {what} cannot be read: {one_line(error)}") from error
    if row is None:
        raise CalibrationDataError(f"The {what} has no rows: name other data, or another split.")
    return dict(row)


def _check_template(
    row: Mapping[str, Any], what: str, training: SFTConfig, model: str, revision: str | None
) -> None:
    given = row.get("chat_template_kwargs")
    own = isinstance(given, Mapping) and given.get("chat_template")
    if training.chat_template_path or own:
        return
    base = adapter_base(model, revision)
    try:  # as the trainer gets it
        processor = AutoProcessor.from_pretrained(
            base or model, revision=None if base else revision, trust_remote_code=False
        )
    except UNREADABLE:  # the trainer says what is wrong with it
        return
    if not processor.chat_template:
        raise UnsupportedModelError(
            f"The {what} holds conversations, and the tokenizer of {base or model} has no chat template: set "
            "`chat_template_path` to a template's file or to a model that has one, or give plain text."
        )
