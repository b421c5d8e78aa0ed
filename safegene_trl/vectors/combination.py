"""Several safety vectors of one family as one, each a component with coefficients of its own.

`V_m = Σ_c B_{m,c} A_{m,c}` by stacking the factors, `[B_1 … B_C] [A_1; …; A_C]`; recalibration then
finds `λ_{l,c}` for every layer and component. Vectors from different degradations point at
different parts of what keeps a model safe.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.atomic_writes import atomic_directory
from ..checkpoints.contents import VECTOR
from ..config.validation import Rule, check_value, folder, shown
from ..errors import ConfigError, FamilyError, VectorError
from ..models.low_rank import LowRankDelta
from ..models.names import component_labels
from ..provenance import software_versions
from .files import WEIGHTS_FILE
from .output import check_vector_output
from .prompt_rows import part_of, verdict_of
from .safety_vector import SafetyVector


_ASK_ALIKE = "make the vectors with the same settings for the answers"


def combine(
    vectors: Sequence[str | Path], output_dir: str | Path, overwrite_output_dir: bool = False
) -> SafetyVector:
    """Makes several safety vectors of one aligned model the components of one, and saves that to
    `output_dir`.

    `V_m = Σ_c B_{m,c} A_{m,c}`, stacked as `[B_1 … B_C] [A_1; …; A_C]` (`(d_out, Σ r_c)` and `(Σ
    r_c, d_in)`, in the first vector's data type); a fine-tune then takes on each component with
    coefficients of its own.

    Args:
        vectors: Directories or hub ids of two or more vectors.
        output_dir: Folder of the vector to be.
        overwrite_output_dir: Replace a vector that is there.

    Returns:
        The vector of all of them; `components` has their ranks.

    Raises:
        ConfigError: `vectors` is no list of two or more names, or `output_dir` begins with `~`.
        VectorError: A vector is missing, incomplete or altered.
        FamilyError: One of them is there twice, they were made from different aligned models, or they
            tell different things of what that model does.
        OutputError: The vector cannot be put there without losing something.
    """
    if isinstance(vectors, str | Path) or not isinstance(vectors, Iterable):
        raise ConfigError(
            f"combine was given {shown(vectors)}: give it a list of two or more vectors."
        )
    names = [str(name) if isinstance(name, Path) else name for name in vectors]
    place = str(output_dir) if isinstance(output_dir, Path) else output_dir
    for name in names:
        check_value("vectors", name, str)
    check_value("output_dir", place, str, Rule(syntax=folder))
    check_value("overwrite_output_dir", overwrite_output_dir, bool)
    target = Path(place)
    check_vector_output(target, {"the vector": names}, overwrite_output_dir)
    vector = combined([SafetyVector.from_pretrained(name) for name in names])
    with atomic_directory(target, kind=VECTOR) as unfinished:
        vector.save_pretrained(unfinished)
    return vector


def combined(vectors: Sequence[SafetyVector]) -> SafetyVector:
    """One vector of several; where one leaves a module alone its part there is zero.

    Raises:
        ConfigError: Fewer than two.
        FamilyError: One of them is there twice, they were made from different aligned models, or they
            tell different things of what that model does.
    """
    if len(vectors) < 2:
        raise ConfigError("One vector alone cannot be combined: name two or more.")
    first = vectors[0]
    if any(
        vector.family != first.family
        or vector.aligned_model["files"] != first.aligned_model["files"]
        for vector in vectors
    ):
        raise FamilyError(
            "The vectors were made from different aligned models: combine vectors of one aligned model."
        )
    named = [
        _weights(part)
        for vector in vectors
        for part in (vector.extraction.get("vectors") or [vector.describe()])
    ]
    if any(named.count(weights) > 1 for weights in named if weights is not None):
        raise FamilyError(
            "One vector is named twice, or is a part of another one: name each of them once."
        )
    shapes = {
        name: (delta.a.shape[1], delta.b.shape[0])
        for vector in vectors
        for name, delta in vector.deltas.items()
    }
    components = [rank for vector in vectors for rank in vector.components]
    return SafetyVector(
        deltas={
            name: _stacked(name, d_in, d_out, vectors) for name, (d_in, d_out) in shapes.items()
        },
        family=first.family,
        aligned_model=first.aligned_model,
        degraded_model={"name": "of the components", "revision": None, "files": {}},
        extraction={
            "method": "combined",
            "rank": sum(components),
            "components": components,
            **_names_of_all(vectors),
            "vectors": [vector.describe() for vector in vectors],
            **_prompts_as_in_all(vectors),
        },
        selection={
            "method": "combined",
            "scores": [],
            "selected_layers": sorted({layer for vector in vectors for layer in vector.layers}),
            "layer_share": 1.0,
            **_test_record(vectors),
        },
        prompts=_rows_of_all(vectors),
        software=software_versions(),
    )


def _names_of_all(vectors: Sequence[SafetyVector]) -> dict[str, Any]:
    """What the vectors call their components; nothing where none names any."""
    if not any("component_names" in vector.extraction for vector in vectors):
        return {}
    names = [
        name if "component_names" in vector.extraction else f"vector_{number}_{name}"
        for number, vector in enumerate(vectors, start=1)
        for name in vector.component_names
    ]
    return {"component_names": component_labels(names)}


def _rows_of_all(vectors: Sequence[SafetyVector]) -> list[dict[str, Any]]:
    """The prompts of all vectors, harmful ones first; of one prompt's rows the one that says most.

    Raises:
        FamilyError: The aligned model refuses a prompt by one vector and answers it by another.
    """
    rows = [row for vector in reversed(vectors) for row in vector.prompts]
    rows.sort(key=lambda row: "targets" in row)
    found: dict[tuple[bool, str, str], dict[str, Any]] = {}
    for row in rows:
        key = part_of(row) == "measure", row["kind"], row["prompt"]
        if key in found and verdict_of(found[key]) != verdict_of(row):
            raise FamilyError(
                f"By one of the vectors the aligned model refuses the prompt {shown(row['prompt'])}, and by another it answers it: "
                f"{_ASK_ALIKE}."
            )
        found[key] = row
    return sorted(found.values(), key=lambda row: row["kind"], reverse=True)


def _test_record(vectors: Sequence[SafetyVector]) -> dict[str, Any]:
    """How the aligned model was asked the prompts to measure on; empty without such.

    Raises:
        FamilyError: The vectors' answers to them were of unlike lengths.
    """
    lengths = [
        {key: record[key] for key in ("max_new_tokens", "max_reasoning_tokens")}
        for vector in vectors
        if (record := vector.selection.get("test_prompts"))
    ]
    if any(each != lengths[0] for each in lengths):
        raise FamilyError(
            f"The vectors' prompts to measure on were asked with unlike numbers of tokens: {_ASK_ALIKE}."
        )
    return {"test_prompts": lengths[0]} if lengths else {}


def _prompts_as_in_all(vectors: Sequence[SafetyVector]) -> dict[str, Any]:
    """How the vectors' prompts were written, as far as that is the same for all."""
    first = vectors[0].extraction
    return {
        key: first[key]
        for key in ("chat_template_kwargs", "safety_target")
        if key in first and all(vector.extraction.get(key) == first[key] for vector in vectors)
    }


def _weights(record: dict[str, Any]) -> str | None:
    """SHA-256 of the weights of a vector, as its record says; None for one that was never saved."""
    found: str | None = (record.get("files") or {}).get(WEIGHTS_FILE, {}).get("sha256")
    return found


def _stacked(name: str, d_in: int, d_out: int, vectors: Sequence[SafetyVector]) -> LowRankDelta:
    dtype = next(iter(vectors[0].deltas.values())).a.dtype
    parts = [
        vector.deltas.get(
            name, LowRankDelta(torch.zeros(vector.rank, d_in), torch.zeros(d_out, vector.rank))
        )
        for vector in vectors
    ]
    a = torch.cat([part.a.to(dtype) for part in parts])
    b = torch.cat([part.b.to(dtype) for part in parts], dim=1)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise VectorError(
            f"The factors of `{name}` are beyond {str(dtype).removeprefix('torch.')}, the data type of the first vector: name a vector "
            "in float32 or bfloat16 first."
        )
    return LowRankDelta(a, b)
