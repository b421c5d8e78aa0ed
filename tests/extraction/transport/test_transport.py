"""A planted direction is found again in a model of another architecture, width, depth and tokenizer."""

import pytest
import torch

from safegene_trl import SafetyVector
from safegene_trl.commands.main import main
from safegene_trl.extraction.transport.transport import steering_directions

from ...conftest import argv
from . import planted


ORIGINS = {
    "pair": {},
    "vector": {"source_degraded_model": None, "source_vector": "vector"},
    "states": {"source_degraded_model": None},
}


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def made(options, root=None, **changes):
    given = {
        key: root / value if key == "source_vector" else value
        for key, value in (options | changes).items()
        if value is not None
    }
    code = main(argv("extract", given))
    return code, given["output_dir"]


@pytest.mark.parametrize("transport_map", ["procrustes", "ridge", "mlp"])
@pytest.mark.parametrize("origin", ["pair", "vector"])
def test_a_planted_direction_is_found_again(pair, options, origin, transport_map):
    root, c = pair
    code, folder = made(options, root, transport_map=transport_map, **ORIGINS[origin])
    assert code == 0
    vector = SafetyVector.from_pretrained(folder)
    expected = c @ planted.frame(48, seed=6)
    found = steering_directions(vector)
    assert sorted(found) == [0, 1, 2, 3, 4]
    print(transport_map, origin, [cosine(d, expected) for d in found.values()])
    assert all(cosine(direction, expected) >= 0.95 for direction in found.values())
