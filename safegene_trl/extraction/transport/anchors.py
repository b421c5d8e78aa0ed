"""The benign texts that maps are fitted on."""

import logging

from ...config.validation import shown
from ...data.prompts import near_duplicates, read_prompts
from ...data.sources import draw
from ...errors import CalibrationDataError
from ..config import ExtractionConfig
from .benign_sentences import benign_sentences


logger = logging.getLogger(__name__)
FEWEST = 40  # a fifth of them is held out
LONGEST = 2000  # characters: sentences, not pages


def read_anchors(config: ExtractionConfig, harmful: list[str]) -> list[str]:
    """The anchors of `config.anchor_data`, or the package's own, each one user turn and each once.

    Args:
        config: Where they are, and how many are drawn by which seed.
        harmful: Prompts that none may nearly repeat.

    Raises:
        CalibrationDataError: They cannot be read, there are too few, or one is nearly a harmful
            prompt.
    """
    source = config.anchor_data or "this package"
    texts = _read(config) if config.anchor_data else benign_sentences()
    anchors: list[str] = draw(texts, config.num_anchors, config.seed)
    if len(anchors) < FEWEST:
        raise CalibrationDataError(
            f"`anchor_data` gives {len(anchors)} anchors to fit a map on: give about 1000 benign sentences, and at least {FEWEST}."
        )
    near = near_duplicates(anchors, harmful)
    if near:
        index, (prompt, _) = next(iter(near.items()))
        raise CalibrationDataError(
            f"{len(near)} of the anchors in {source} nearly repeat harmful prompts, and a map is to be fitted on benign texts alone: "
            f"remove {shown(anchors[index])}, which is like {shown(prompt)}, and the others."
        )
    return anchors


def _read(config: ExtractionConfig) -> list[str]:
    """The texts of `config.anchor_data` that can be anchors; how many cannot is told."""
    source = config.anchor_data
    found, skipped = read_prompts(source, "benign", config.data_split, None, config.seed)
    texts = list(dict.fromkeys(each.text for each in found if len(each.messages) == 1))
    short = [text for text in texts if len(text) <= LONGEST]
    left_out = skipped.total() + len(found) - len(short)
    if left_out:
        logger.warning(
            "%s rows of %s are left out as anchors: they are no single user turns, or longer than %s characters.",
            left_out,
            source,
            LONGEST,
        )
    return short
