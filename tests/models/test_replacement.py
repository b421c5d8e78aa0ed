"""Live tensors come back as they were, whatever happens while others are in their place."""

import sys

import pytest
import torch

from safegene_trl.distributed import layouts as sharding
from safegene_trl.models.parameters import canonical_parameters
from safegene_trl.models.replacement import replaced, without_adapters

from ..conftest import ALONE, make_model, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_live_weights_come_back_bit_by_bit(lora, room, monkeypatch):
    monkeypatch.setattr(sharding, "_has_room", lambda live: room)
    model = with_lora(make_model()) if lora else make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(IDS).logits
    with (
        pytest.raises(ZeroDivisionError),
        replaced(list(canonical_parameters(model)), lambda p: torch.ones(p.shape), ALONE),
        without_adapters(model),
    ):
        assert all((p.tensor == 1).all() for p in canonical_parameters(model))
        assert not torch.equal(model(IDS).logits, plain)
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("room", [True, False])
def test_an_interruption_in_the_middle_of_a_replacement_leaves_no_trace(room, monkeypatch):
    """At every line of it; what a signal does."""
    monkeypatch.setattr(sharding, "_has_room", lambda live: room)
    model = make_model(layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = 0
    while True:
        left = tried = tried + 1

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_name == "overwrite" and event in ("line", "return"):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        earlier = sys.gettrace()
        sys.settrace(trace)
        try:
            with replaced(list(canonical_parameters(model)), lambda p: torch.ones(p.shape), ALONE):
                sys.settrace(earlier)
            break
        except KeyboardInterrupt:
            assert all(
                torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()
            ), tried
        finally:
            sys.settrace(earlier)
    assert tried > 30
