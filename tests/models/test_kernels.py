"""Attention by kernels that take a new shape as it comes."""

import pytest
import torch

from safegene_trl.models.attachment import frozen_for_calibration
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.kernels import kernels_for_any_shape


def used():
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_left_out_and_comes_back_as_it_was(before):
    own = used()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(RuntimeError, match="inside"), kernels_for_any_shape():
            assert not used()
            raise RuntimeError("inside")
        assert used() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(own)


def test_calibration_and_decoding_do_without(model, tokenizer):
    seen, own = [], used()
    handle = model.register_forward_hook(lambda *args: seen.append(used()))
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with frozen_for_calibration(model):
            model(torch.tensor([[1, 2]]))
        messages = [[{"role": "user", "content": "Hello"}]]
        generate_answers(model, tokenizer, messages, 2, 1)
        model(torch.tensor([[1, 2]]))
    finally:
        handle.remove()
        torch.backends.cuda.enable_cudnn_sdp(own)
    assert len(seen) >= 3 and not any(seen[:-1]) and seen[-1]
