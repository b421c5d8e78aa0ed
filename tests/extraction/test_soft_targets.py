"""What a model itself says to its answers, as it is stored with a vector."""

import math

import pytest
import torch

from safegene_trl import ExtractionConfig, SafetyVector, extract
from safegene_trl.errors import MemoryShortageError
from safegene_trl.extraction import soft_targets as module
from safegene_trl.extraction.soft_targets import soft_targets
from safegene_trl.models.inputs import Sample, SoftTargets, collate
from safegene_trl.models.losses import response_logits

from ..conftest import ALONE, make_model


def samples():
    """Of unlike lengths and with unlike responses."""
    made = []
    for index, (prompt, response) in enumerate(((4, 3), (9, 1), (6, 5), (3, 5))):
        ids = torch.arange(10 * index + 1, 10 * index + 1 + prompt + response).tolist()
        made.append(Sample(ids, [place >= prompt for place in range(len(ids))]))
    return made


def sure(model, batch):
    """The model's own logits, with the response's tokens the likeliest."""
    logits, ids = response_logits(model, batch)
    return logits.scatter(-1, ids[:, None], logits.amax(dim=-1, keepdim=True) + 2), ids


@pytest.mark.parametrize("size", [1, 2, 8])
def test_each_place_has_the_models_own_likeliest_tokens(size, monkeypatch):
    monkeypatch.setattr(module, "response_logits", sure)
    model = make_model()
    found = soft_targets(model, samples(), 0, ALONE, size)
    for sample, targets in zip(samples(), found, strict=True):
        assert targets.tokens == sample.response
        logits, _ = sure(model, collate([sample], 0, torch.device("cpu")))
        top = logits.log_softmax(dim=-1).topk(16)
        assert targets.ids == top.indices.tolist()
        expected = torch.tensor(targets.log_probs)
        torch.testing.assert_close(expected, top.values, atol=1e-4, rtol=0)


def test_they_end_before_a_token_that_the_model_would_not_say(monkeypatch):
    def unlike(model, batch):
        logits, ids = sure(model, batch)
        logits[2, ids[2]] = logits.min() - 5
        return logits, ids

    monkeypatch.setattr(module, "response_logits", unlike)
    (found,) = soft_targets(make_model(), samples()[3:], 0, ALONE, 1)
    assert found.tokens == samples()[3].response[:2]
    assert len(found.ids) == len(found.log_probs) == 2


def test_memory_that_runs_out_halves_the_batches(monkeypatch):
    sizes = []

    def small(model, batch):
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return response_logits(model, batch)

    monkeypatch.setattr(module, "response_logits", small)
    model = make_model()
    found = soft_targets(model, samples(), 0, ALONE, 4)
    assert sizes == [4, 2, 1, 1, 1, 1] and len(found) == 4

    def none(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "response_logits", none)
    with pytest.raises(MemoryShortageError):
        soft_targets(model, samples(), 0, ALONE, 2)


@pytest.mark.parametrize("says", [True, False])
def test_an_extraction_stores_them_where_the_model_says_so(says, extraction, monkeypatch):
    if says:
        monkeypatch.setattr(module, "response_logits", sure)
    options = {key: str(value) for key, value in extraction.items()}
    extract(ExtractionConfig(**options), show_progress=False)
    vector = SafetyVector.from_pretrained(options["output_dir"])
    assert vector.describe()["format_version"] == (3 if says else 2) and vector.prompts
    for row in vector.prompts:
        assert ("targets" in row) == says
        if says:
            targets = SoftTargets(**row["targets"])
            assert 0 < len(targets.tokens) <= 8 and len(targets.ids[0]) == 16
            assert all(sum(map(math.exp, place)) <= 1.01 for place in targets.log_probs)
