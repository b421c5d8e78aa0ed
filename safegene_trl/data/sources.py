"""Rows from where users have them: a file, a folder, or a data set of the hub."""

import random
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from ..errors import CalibrationDataError
from ..provenance import sha256_of_file


T = TypeVar("T")
FILES = {".json", ".jsonl", ".csv", ".tsv", ".parquet"}


def check_there(source: str) -> None:
    """Raises `CalibrationDataError` for the name of a data file that is not there, or that datasets
    would take for a pattern. What else is not there may be a hub id.
    """
    if Path(source).suffix in FILES and not Path(source).exists():
        raise CalibrationDataError(
            f"The data file {source} is not there: check its path; a relative one begins at {Path.cwd()}."
        )
    if Path(source).is_file() and (has_magic(source) or "::" in source):
        raise CalibrationDataError(
            f"The path of the data file {source} holds `*`, `?`, `[` or `::`, which datasets takes for a pattern: rename it."
        )


def load_rows(source: str, split: str) -> Dataset:
    """Reads a local file or directory, or a hub data set; raises `CalibrationDataError` in plain
    words.

    Args:
        source: Path or hub id. `ID:CONFIG@SPLIT` names one configuration and one split, each of
            which may be left out.
        split: Split to read where `source` names none.
    """
    check_there(source)
    path = Path(source)
    name, config, split = (source, None, split) if path.exists() else parts_of(source, split)
    try:
        if path.is_file():
            kind = {".jsonl": "json", ".tsv": "csv"}.get(path.suffix, path.suffix.lstrip("."))
            # only an empty cell is none: `None` and `NA` are words
            cells = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
            cells |= {"sep": "\t"} if path.suffix == ".tsv" else {}
            data = load_dataset(
                kind,
                # a cache of its own for every content: times and names of files do not tell it
                name=sha256_of_file(path)[:16],
                data_files=str(path),
                split="train",
                **cells,
            )
        elif path.is_dir() and (path / "state.json").exists():
            data = load_from_disk(source)
        else:
            data = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises dozens of kinds; each means the same to the user
        raise CalibrationDataError(
            f"The data set {source} (split {split}) cannot be read or is empty: check the path or hub id, the configuration (`ID:CONFIG@SPLIT` "
            f"names one), the split and the file format "
            f"({type(error).__name__}: {error})."
        ) from error
    if len(data) == 0:
        raise CalibrationDataError(
            f"The data set {source} (split {split}) is empty: give at least 2 samples."
        )
    return data


def parts_of(source: str, split: str) -> tuple[str, str | None, str]:
    """Name, configuration (None where it is not named) and split (`split` where it is not) of
    `NAME:CONFIG@SPLIT`.
    """
    named, _, own_split = source.partition("@")
    name, _, config = named.partition(":")
    return name, config or None, own_split or split


def draw(data: Sequence[T] | IterableDataset, count: int, seed: int) -> list[T]:
    """Up to `count` items in seeded random order; from a stream, its first ones. The global RNG is
    not used.
    """
    if isinstance(data, IterableDataset):
        return list(data.take(count))
    indices = random.Random(seed).sample(range(len(data)), min(count, len(data)))
    return [data[index] for index in indices]
