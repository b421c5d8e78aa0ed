"""States that are made up, on disk."""

import numpy as np

from safegene_trl.extraction.transport.states import Rows


def rows(folder, name, values) -> Rows:
    """An array as the states of a run."""
    found = Rows(folder / name, *values.shape)
    found.open("w+")[:] = values
    return found


def related(folder, count=300, latent=10, widths=(24, 40), noise=0.0, seed=0):
    """States of two models that see the same in every text, and the frame of each."""
    draw = np.random.default_rng(seed)
    frames = [np.linalg.qr(draw.standard_normal((width, latent)))[0].T for width in widths]
    seen = draw.standard_normal((count, latent)) * np.linspace(2, 0.5, latent)
    sides = [
        3 + seen @ frame + noise * draw.standard_normal((count, width))
        for frame, width in zip(frames, widths, strict=True)
    ]
    return [rows(folder, f"{seed}-{i}", side) for i, side in enumerate(sides)], frames
