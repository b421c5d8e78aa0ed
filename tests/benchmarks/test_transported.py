"""Vectors carried over from another family, and their controls."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.paper_table import families
from benchmarks.paper_table.families import Family
from benchmarks.study import transported as module
from benchmarks.study.transported import CARRIED, differences, fitted, transported
from benchmarks.study.variants import VARIANTS
from safegene_trl.errors import SafeGeneError

from ..conftest import refusing
from ..extraction.transport import planted
from ..extraction.transport.conftest import pair  # noqa: F401
from .conftest import written


@pytest.fixture
def lab(pair, tmp_path, monkeypatch):  # noqa: F811
    root, _ = pair
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    monkeypatch.setattr(families, "WORK", tmp_path / "work")
    files = planted.prompt_files(tmp_path)
    monkeypatch.setattr(module, "BENIGN_PROMPTS", files["benign_data"])
    written(tmp_path / "data/harmful/catqa.jsonl", [{"prompt": text} for text in planted.HARMFUL])
    settings = module._settings

    def quick(lab):
        found = settings(lab)
        found.anchor_data, found.map_penalty = str(files["anchor_data"]), 1e-4
        return found

    monkeypatch.setattr(module, "_settings", quick)
    family = Family("planted", str(root / "target"), source=str(root / "source"))
    return SimpleNamespace(family=family, data=tmp_path / "data")


def cosines(one, other):
    return [
        float(torch.nn.functional.cosine_similarity(own.b[:, 0], other.deltas[name].b[:, 0], dim=0))
        for name, own in one.deltas.items()
    ]


def test_controls_differ_in_the_direction_alone(lab):
    vector = transported(lab)
    assert set(CARRIED) <= set(VARIANTS)
    for name, make in CARRIED.items():
        other = make(lab)
        assert list(other.deltas) == list(vector.deltas) and other.prompts == vector.prompts
        for module_name, delta in other.deltas.items():
            mine = vector.deltas[module_name]
            assert torch.equal(delta.a, mine.a)
            torch.testing.assert_close(
                delta.b.float().norm(), mine.b.float().norm(), rtol=2e-3, atol=0.0
            )
        same = name == "transported"
        assert all(value > 0.999 for value in cosines(vector, other)) == same, name
    # both models have the same in mind, so that the map finds what the target has itself
    assert min(cosines(vector, CARRIED["transported, own direction"](lab))) > 0.95
    assert max(map(abs, cosines(vector, CARRIED["transported, random direction"](lab)))) < 0.5


def test_it_is_made_once(lab, monkeypatch):
    first = transported(lab)
    monkeypatch.setattr(module, "extract", None)
    assert transported(lab).files == first.files


def test_a_family_without_a_source(lab):
    lab.family = Family("alone", lab.family.aligned)
    with pytest.raises(SafeGeneError, match="The family alone has no source: name one by --source"):
        transported(lab)


def test_differences_are_of_every_layer(lab):
    found = differences(lab, lab.family.source)
    assert len(found) == 3 and all(own.shape == (32,) for own in found)


def test_a_direction_is_cut_or_filled():
    direction = torch.tensor([1.0, 2.0, 3.0])
    assert fitted(direction, 2).tolist() == [1, 2]
    assert fitted(direction, 5).tolist() == [1, 2, 3, 0, 0]
