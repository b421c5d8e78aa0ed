"""A base in 4 bits under DDP, on two processes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import make_vector
from ..quantization import quantised, wide_model
from ..step.test_quantized_step import expected
from .launching import run_plans


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_ddp_merges_into_the_16_bit_base(forked, tokenizer, tmp_path):
    base, loaded, out = tmp_path / "base", tmp_path / "base-4bit", tmp_path / "out"
    wide_model().save_pretrained(base)
    quantised(base, 4).save_pretrained(loaded)
    tokenizer.save_pretrained(loaded)
    make_vector(wide_model(), tokenizer, std=0.1).save_pretrained(tmp_path / "vector")
    plan = {
        "backend": "ddp",
        "lora": True,
        "dtype": "bfloat16",
        "model": str(loaded),
        "vector": str(tmp_path / "vector"),
        "out": str(out),
        "config": {"merge_base": str(base), "granularity": "module", "num_test_prompts": 2},
    }
    run_plans(forked, tmp_path, [plan], timeout=240)
    found = json.loads((out / "result-0.json").read_text())
    report, folder = found["report"], out / "with/safeguarded"
    assert found["same_on_all_ranks"] and report["launch"]["processes"] == 2
    assert report["shipped"]["base"]["recalibrated_on"].startswith("4-bit base")
    wanted = expected(base, out / "with", report, tmp_path / "vector")
    written = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == wanted.keys() and report["shipped"]["exact_tensors"] == len(wanted)
    for name, tensor in wanted.items():
        assert written[name].dtype == torch.bfloat16
        torch.testing.assert_close(written[name].float(), tensor, rtol=2**-7, atol=1e-6)
