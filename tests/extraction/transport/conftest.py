"""Source and target of a transport, on disk."""

import pytest
import torch

from safegene_trl.provenance import model_reference

from ...conftest import make_vector, refusing
from . import planted


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a planted source, its degraded twin, its safety vector and a target, and what is
    planted: `(folders, c)`.
    """
    root = tmp_path_factory.mktemp("planted")
    tokenizer, other = planted.source_tokenizer(), planted.target_tokenizer()
    degraded = planted.planted_model("llama", tokenizer, 32, 3, seed=5)
    planted.save(degraded, tokenizer, root / "degraded")
    deltas, c = planted.planted_delta(degraded, tokenizer, seed=5)
    with torch.no_grad():
        for name, delta in deltas.items():
            degraded.get_submodule(name).weight += delta.dense()
    planted.save(degraded, tokenizer, root / "source")
    vector = make_vector(degraded, tokenizer, deltas)
    vector.selection["selected_layers"] = [0]
    vector.extraction["rank"] = 1
    vector.aligned_model = model_reference(str(root / "source"))
    vector.save_pretrained(root / "vector")
    target = planted.planted_model("qwen2", other, 48, 5, seed=6)
    planted.save(target, other, root / "target")
    return root, c


@pytest.fixture
def options(pair, tmp_path, monkeypatch):
    """Settings of a transport from the planted source's pair; the tiny target refuses."""
    root, _ = pair
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    return {
        "method": "transport",
        "source_model": root / "source",
        "source_degraded_model": root / "degraded",
        "aligned_model": root / "target",
        "output_dir": tmp_path / "vector",
        "map_penalty": 1e-4,
        "selection": "all",
        **planted.prompt_files(tmp_path),
    }
