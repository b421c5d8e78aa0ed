"""Each layer of the target with the direction that is carried over to it, and how well that is known."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import FamilyError
from ..config import ExtractionConfig
from ..selection import LayerScores
from .directions import LayerDirection, cosine, layer_direction, spread_of
from .maps import MAPS, Fit, Quality, carried, held_out_quality, rank_warning, split
from .matching import MATCHINGS
from .sides import SourceStates, TargetStates


logger = logging.getLogger(__name__)
LEAST_AGREEMENT = (
    0.5  # cosine of the directions of two halves of the prompts, below which it is chance
)


@dataclass(frozen=True)
class CarriedLayer:
    """One layer of the target.

    Attributes:
        source_layer: Which layer of the source its direction comes from.
        direction: Of that layer, in the source.
        quality: Of the map, on anchors held out.
        vector: The direction in the target, float64, `(hidden,)`; `‖vector‖` is the direction's size
            in the source, `ρ`, times the spread of the target's own states.
        own_cosine: Cosine with the difference of the target's own means over harmful and benign
            prompts: nothing is made of it, and it tells where a direction went.
        usable: Whether direction and map are known well enough.
    """

    source_layer: int
    direction: LayerDirection
    quality: Quality
    vector: np.ndarray
    own_cosine: float
    usable: bool

    def record(self) -> dict[str, Any]:
        """What the vector says of it."""
        return {
            "source_layer": self.source_layer,
            "explained": round(self.quality.explained, 6),
            "cosine": round(self.quality.cosine, 6),
            "agreement": round(self.direction.agreement, 6),
            "size": round(self.direction.size, 6),
            "length": float(np.linalg.norm(self.vector)),
            "own_cosine": round(self.own_cosine, 6),
        }


def carry(
    config: ExtractionConfig, source: SourceStates, target: TargetStates
) -> list[CarriedLayer]:
    """The target's layers, in order.

    Raises:
        CalibrationDataError: There are too few anchors for a map.
        FamilyError: The source shows no direction, or no map is good enough.
    """
    fitted, held_out = split(source.anchors[0].count)
    if warning := rank_warning(
        len(fitted), source.anchors[0].width, config.transport_map, config.map_penalty
    ):
        logger.warning(warning)
    matching = MATCHINGS[config.layer_matching](source.anchors, target.anchors, fitted)
    directions = {layer: _direction(config, source, layer) for layer in sorted(set(matching))}
    _check_directions(config, directions.values())
    found = []
    for layer, origin in enumerate(matching):
        one, other = source.anchors[origin], target.anchors[layer]
        mapped = MAPS[config.transport_map](
            Fit(one, other, fitted, config.map_penalty, config.seed + layer)
        )
        quality = held_out_quality(mapped, one, other, held_out)
        direction = directions[origin]
        vector = carried(mapped, direction.vector, source.benign[origin].read())
        norm = float(np.linalg.norm(vector))
        length = direction.size * spread_of(other)
        own = target.harmful[layer].read().mean(axis=0) - target.benign[layer].read().mean(axis=0)
        usable = (
            norm > 0
            and quality.cosine >= config.min_transport_quality
            and direction.agreement >= LEAST_AGREEMENT
        )
        scaled = vector * (length / norm if norm else 0.0)
        found.append(
            CarriedLayer(origin, direction, quality, scaled, cosine(vector, own), bool(usable))
        )
    _check_quality(config, found)
    return found


def _direction(config: ExtractionConfig, source: SourceStates, layer: int) -> LayerDirection:
    spread = spread_of(source.anchors[layer])
    return layer_direction(*source.looked_at(layer), spread, config.seed)


def _check_directions(config: ExtractionConfig, directions: Any) -> None:
    best = max(each.agreement for each in directions)
    if best < LEAST_AGREEMENT:
        raise FamilyError(
            f"{config.source_model} shows no direction of its own on harmful prompts: those of two halves of the prompts have a cosine "
            f"of at most {best:.2f}, and {LEAST_AGREEMENT} is needed: give an aligned source, a source that differs more from its "
            "degraded model, or more prompts."
        )


def _check_quality(config: ExtractionConfig, layers: Sequence[CarriedLayer]) -> None:
    poor = [index for index, layer in enumerate(layers) if not layer.usable]
    if len(poor) == len(layers):
        best = max(layer.quality.cosine for layer in layers)
        raise FamilyError(
            f"No layer of {config.aligned_model} takes on a direction of {config.source_model}: on anchors held out the best map has a cosine "
            f"of {best:.2f} with the true states, and `min_transport_quality` is {config.min_transport_quality}: give more anchors, "
            "another `transport_map`, `layer_matching` or `state_pooling`, or a source that is more alike."
        )
    if poor:
        logger.warning(
            "These layers of %s take no direction on, because the map's cosine on anchors held out is below %s or the direction in "
            "the source is one of chance: %s.",
            config.aligned_model,
            config.min_transport_quality,
            ", ".join(map(str, poor)),
        )


def scores(layers: Sequence[CarriedLayer]) -> LayerScores:
    """Of every layer `ρ` times the map's cosine on anchors held out, and 0 where nothing is carried
    over, as means over prompts.
    """

    def of(kind: str) -> torch.Tensor:
        columns = [
            getattr(layer.direction, kind) * (layer.quality.cosine if layer.usable else 0.0)
            for layer in layers
        ]
        return torch.from_numpy(np.stack(columns, axis=1))

    return LayerScores([(1.0, of("harmful")), (-1.0, of("benign"))])
