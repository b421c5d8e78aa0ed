"""EnchTable's coefficients: the block formula against the full product."""

import json
import math

import pytest
import torch

from safegene_trl import SafetyVector
from safegene_trl.commands.main import main
from safegene_trl.errors import FamilyError
from safegene_trl.extraction.delta import adapter_delta
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.step.interference import interference, interference_coefficients

from ..conftest import make_model, with_lora


def delta(seed, rank, scale=1.0, shape=(10, 8)):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, shape[1], generator=generator)
    return LowRankDelta(a, scale * torch.randn(shape[0], rank, generator=generator))


def full_product(task, vector):
    """`mean |(UᵀU − 1) Σ (VᵀV − 1)|` as the paper writes it."""
    parts = []
    for each, rank in ((task, task.a.shape[0]), (vector, vector.a.shape[0])):
        u, s, vh = torch.linalg.svd(each.dense().double(), full_matrices=False)
        parts.append((u[:, :rank], s[:rank], vh[:rank].T))
    u, v = (torch.cat([parts[0][i], parts[1][i]], dim=1) for i in (0, 2))
    one = torch.eye(u.shape[1], dtype=torch.float64)
    m = (u.T @ u - one) @ torch.diag(torch.cat([parts[0][1], parts[1][1]])) @ (v.T @ v - one)
    return float(m.abs().mean())


@pytest.mark.parametrize(("first", "second"), [(2, 2), (1, 4), (3, 2)])
def test_blocks_are_the_full_product(first, second):
    task, vector = delta(0, first), delta(1, second, scale=0.1)
    assert interference(task, vector) == pytest.approx(full_product(task, vector), rel=1e-5)


def test_orthogonal_changes_do_not_interfere_and_equal_ones_do():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    one = LowRankDelta(basis[:2], torch.eye(10)[:, :2])
    other = LowRankDelta(basis[2:4], torch.eye(10)[:, 2:4])
    assert interference(one, other) == pytest.approx(0, abs=1e-7)
    assert (
        interference(one, one) == pytest.approx(full_product(one, one), rel=1e-5)
        and interference(one, one) > 0.2
    )


def test_coefficients():
    tasks = {"m": delta(0, 2, scale=1e-3), "n": delta(2, 2, scale=1e-3)}
    vectors = {"m": delta(1, 3, scale=1e-2), "free": delta(3, 3, scale=1e-2)}
    found = interference_coefficients(tasks, vectors)
    norms = [
        math.sqrt(sum(float(d.dense().square().sum()) for d in each.values()))
        for each in (tasks, vectors)
    ]
    alpha = 0.1 * norms[0] / norms[1]
    assert found["free"] == pytest.approx(alpha, rel=1e-5)
    assert found["m"] == pytest.approx(
        alpha * math.exp(-200 * full_product(tasks["m"], vectors["m"])), rel=1e-4
    )
    with pytest.raises(FamilyError, match="changes no weight"):
        interference_coefficients({"m": delta(0, 2, scale=0.0)}, vectors)


@pytest.mark.parametrize("full", [False, True])
def test_command(full, model_dir, vector_dir, tokenizer, tmp_path, capsys):
    adapted = with_lora(make_model())
    task = {name: found.delta for name, found in adapter_delta(adapted, make_model()).items()}
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    tuned = adapted.merge_and_unload() if full else adapted
    for part in (tuned, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    words = [
        "apply",
        "--model_name_or_path",
        str(tmp_path / "tuned"),
        "--coefficients",
        "interference",
    ]
    words += [f"--safegene.vector={vector_dir}", f"--safegene.output.output_dir={tmp_path / 'out'}"]
    if full:
        assert main(words) == 2
        assert "name it as `base_model`" in capsys.readouterr().err
        words += ["--base_model", str(model_dir)]
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "safegene_report.json").read_text())
    expected = interference_coefficients(task, SafetyVector.from_pretrained(vector_dir).deltas)
    assert report["coefficients"] == pytest.approx(expected, rel=2e-2 if full else 1e-5)
