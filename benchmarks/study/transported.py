"""Vectors that are carried over from another family, and the controls that tell what of them helps.

`transported` is the vector that `safegene extract --method transport` makes. The others have its
detectors, layers and sizes, and another direction in each layer: one drawn at random; the source's
own, cut or filled with zeros to the target's width; and the target's own difference between harmful
and benign prompts, which is what a perfect map would be worth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import prompt_source
from safegene_trl import ExtractionConfig, SafetyVector, extract
from safegene_trl.distributed.processes import this_job
from safegene_trl.errors import SafeGeneError
from safegene_trl.extraction.prompts import ExtractionPrompts
from safegene_trl.extraction.transport.sides import Texts, read_source
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import layer_index

from .bank import BENIGN_PROMPTS


PROMPTS = 96  # of each kind
Directions = Mapping[int, torch.Tensor]


def transported(lab: Lab) -> SafetyVector:
    """The family's vector from its source's direction. Made once.

    Raises:
        SafeGeneError: The family names no source, or nothing can be carried over.
    """
    folder = _folder(lab)
    if not (folder / "safegene_config.json").is_file():
        extract(_settings(lab), show_progress=False)
    return SafetyVector.from_pretrained(folder)


def at_random(lab: Lab) -> SafetyVector:
    vector = transported(lab)
    generator = torch.Generator().manual_seed(0)
    width = next(iter(vector.deltas.values())).b.shape[0]
    return with_directions(
        vector, {layer: torch.randn(width, generator=generator) for layer in vector.layers}
    )


def unmapped(lab: Lab) -> SafetyVector:
    vector = transported(lab)
    layers = vector.extraction["transport"]["layers"]
    width = next(iter(vector.deltas.values())).b.shape[0]
    found = differences(lab, str(lab.family.source))
    return with_directions(
        vector,
        {layer: fitted(found[layers[layer]["source_layer"]], width) for layer in vector.layers},
    )


def own(lab: Lab) -> SafetyVector:
    vector = transported(lab)
    found = differences(lab, lab.family.aligned)
    return with_directions(vector, {layer: found[layer] for layer in vector.layers})


CARRIED: dict[str, Callable[[Lab], SafetyVector]] = {
    "transported": transported,
    "transported, random direction": at_random,
    "transported, unmapped": unmapped,
    "transported, own direction": own,
}


def with_directions(vector: SafetyVector, directions: Directions) -> SafetyVector:
    """The vector with what it writes turned into other directions, as long as its own ones."""
    deltas = {}
    for name, delta in vector.deltas.items():
        column = directions[layer_index(name) or 0].float()[:, None]
        length = delta.b.float().norm()
        deltas[name] = LowRankDelta(delta.a, (column / column.norm() * length).to(delta.b.dtype))
    return replace(vector, deltas=deltas)


def fitted(direction: torch.Tensor, width: int) -> torch.Tensor:
    """Cut, or filled with zeros."""
    found = torch.zeros(width)
    found[: len(direction)] = direction[:width]
    return found


def differences(lab: Lab, model: str) -> Sequence[torch.Tensor]:
    """Of a model, by layer, the mean state of harmful prompts minus that of benign ones."""
    config = replace(_settings(lab), source_model=model)
    harmful, benign = _prompts(config)
    with TemporaryDirectory() as place:  # one anchor, because none are read
        states = read_source(
            config, Texts(benign[:1], harmful, benign), None, Path(place), this_job()
        )
        pairs = [states.looked_at(layer) for layer in range(len(states.harmful))]
    return [torch.from_numpy(np.subtract(*(side.mean(0) for side in pair))) for pair in pairs]


def _folder(lab: Lab) -> Path:
    return lab.family.work / "vectors" / "transported"


def _settings(lab: Lab) -> ExtractionConfig:
    if lab.family.source is None:
        raise SafeGeneError(f"The family {lab.family.name} has no source: name one by --source.")
    return ExtractionConfig(
        method="transport",
        aligned_model=lab.family.aligned,
        source_model=lab.family.source,
        harmful_data=prompt_source("harmful/catqa.jsonl", lab.data),
        benign_data=str(BENIGN_PROMPTS),
        num_safety_prompts=PROMPTS,
        num_benign_prompts=PROMPTS,
        output_dir=str(_folder(lab)),
        dtype=lab.family.dtype,
    )


def _prompts(config: ExtractionConfig) -> tuple[list[str], list[str]]:
    harmful, benign = ExtractionPrompts.read(config).to_answer()
    return list(harmful), list(benign)
