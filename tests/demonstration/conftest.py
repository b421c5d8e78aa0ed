"""A tiny family in folders: an aligned model, a fine-tune of it, a vector and what a safety step made
of them.
"""

from types import SimpleNamespace

import pytest

from safegene_trl import SafeGeneConfig
from safegene_trl.demonstration.config import DemoConfig
from safegene_trl.demonstration.side_by_side import load_side_by_side
from safegene_trl.provenance import model_reference
from safegene_trl.step.apply import apply

from ..conftest import make_deltas, make_model, make_vector


TOKENS = 6  # of an answer


def make_family(folder, tokenizer):
    """Folders by their names."""
    places = SimpleNamespace(
        **{name: folder / name for name in ("aligned", "tuned", "vector", "safeguarded")}
    )
    tuned = make_model()
    for name, delta in make_deltas(tuned, seed=8, std=0.1).items():
        tuned.get_submodule(name).weight.data += delta.dense()
    for model, place in ((make_model(), places.aligned), (tuned, places.tuned)):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    vector = make_vector(make_model(), tokenizer, make_deltas(make_model(), std=0.1))
    vector.aligned_model = model_reference(str(places.aligned)) | {"name": str(places.aligned)}
    vector.save_pretrained(places.vector)
    safeguard(places, 0.8, places.safeguarded)
    return places


def safeguard(places, coefficient, target):
    """Merges the vector into the fine-tune."""
    config = SafeGeneConfig(
        vector=str(places.vector), allow_other_base=True, output={"output_dir": str(target)}
    )
    apply(config, str(places.tuned), coefficients=str(coefficient))


@pytest.fixture(scope="package")
def family(tmp_path_factory, tokenizer):
    return make_family(tmp_path_factory.mktemp("family"), tokenizer)


def config_for(folder, **options):
    return DemoConfig(
        safeguarded=str(folder), max_new_tokens=TOKENS, **{k: str(v) for k, v in options.items()}
    )


@pytest.fixture(scope="package")
def models(family):
    """Side by side; nothing changes them but that they remember what they were asked."""
    return load_side_by_side(config_for(family.safeguarded))
