"""A written checkpoint in the live model's place, and what reading it back takes."""

from collections import Counter

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from safegene_trl.checkpoints import read_ahead
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import NO_VECTOR
from safegene_trl.errors import CheckpointError
from safegene_trl.models import parameters
from safegene_trl.step.read_back import as_written

from ..conftest import ALONE, make_model, small_shape


def experts(layers=2):
    """A model whose experts are fused in memory and apart in its files."""
    torch.manual_seed(0)
    shape = small_shape(num_hidden_layers=layers, moe_intermediate_size=16)
    config = Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture
def written(tokenizer, tmp_path):
    def write(model):
        tmp_path.joinpath("written").mkdir()
        save_merged(
            model, NO_VECTOR, CheckpointFolder(tmp_path / "written", tokenizer, "1GB"), ALONE
        )
        return tmp_path / "written"

    return write


@pytest.mark.parametrize("make", [make_model, experts])
def test_a_tensor_is_read_once_and_the_model_looked_through_once(make, written, monkeypatch):
    model = make()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = written(model)
    read, looked = Counter(), []
    whole, revert = read_ahead.read_exactly, parameters.revert_weight_conversion

    def counted(descriptor, view, position, path):
        read[position, len(view)] += 1
        return whole(descriptor, view, position, path)

    def reverted(base, tensors):
        looked.append(len(tensors))
        return revert(base, tensors)

    monkeypatch.setattr(read_ahead, "read_exactly", counted)
    monkeypatch.setattr(parameters, "revert_weight_conversion", reverted)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    with as_written(model, folder, ALONE):
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    held = sum(own[name].nbytes for name, _ in model.named_parameters())
    assert set(read.values()) == {1} and sum(size for _, size in read) == held
    # where experts lie in the files is asked for one parameter at a time
    assert looked[0] == len(list(model.named_parameters())) and set(looked[1:]) <= {1}
    assert not model.model.norm.weight.any()


@pytest.mark.parametrize("make", [make_model, experts])
def test_files_that_lack_a_tensor_or_hold_another_are_refused(make, written):
    model = make()
    folder = written(model)
    with (
        pytest.raises(CheckpointError, match=r"holds model\.layers\.1.* which the model has not"),
        as_written(make(layers=1), folder, ALONE),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match=r"lacks model\.layers\.[23]\.input_layernorm\.weight"),
        as_written(make(layers=4), folder, ALONE),
    ):
        pass
