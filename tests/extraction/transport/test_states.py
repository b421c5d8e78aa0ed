"""Pooled states on disk: which tokens count, in whatever batches, and what cannot be trusted."""

import errno
import os

import numpy as np
import pytest
import torch

from safegene_trl import SafeGeneError
from safegene_trl.extraction.transport import states
from safegene_trl.extraction.transport.states import Reader, record
from safegene_trl.models.reasoning import AS_TEMPLATE
from safegene_trl.models.residual import decoder_layers, residual_writers

from ...conftest import ALONE, BENIGN, HARMFUL, make_model


TEXTS = [*HARMFUL[:5], "a", BENIGN[0] + " and some more words"]


@pytest.fixture
def reader(tokenizer):
    return Reader("a tiny model", make_model(), tokenizer, ALONE, AS_TEMPLATE)


def read(reader, folder, pooling="last", texts=TEXTS, inputs_of=3):
    layers = {str(index): layer for index, layer in decoder_layers(reader.model).items()}
    return record(reader, texts, folder, layers, residual_writers(reader.model), pooling, inputs_of)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_states_are_those_of_each_text_alone(reader, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(states, "fitting_answers", lambda *_: batch_size)
    found = read(reader, tmp_path)
    mean = read(reader, tmp_path, "mean")
    assert reader.around() == (1, 2)  # <|user|>, and <|end|><|assistant|>
    module = "model.layers.1.mlp.down_proj"
    for index, ids in enumerate(reader.tokens(TEXTS)):
        seen = {}
        hook = reader.model.get_submodule(module).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(x=args[0][0])
        )
        with torch.no_grad():
            hidden = reader.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        hook.remove()
        for layer in (0, 1):  # the last one's comes after the norm there
            own = hidden[layer + 1][0]
            assert np.allclose(found[str(layer), "last"].read()[index], own[-1], atol=1e-4)
            assert np.allclose(mean[str(layer), "mean"].read()[index], own[1:-2].mean(0), atol=1e-4)
        if index < 3:
            assert np.allclose(found[module, "last"].read()[index], seen["x"][-1], atol=1e-4)
            assert np.allclose(
                found[module, "mean"].read()[index], seen["x"][1:-2].mean(0), atol=1e-4
            )
    assert found["0", "last"].count == 7 and found[module, "last"].count == 3


def test_without_a_template_the_first_token_is_left_out(reader, tmp_path):
    plain = Reader("plain", reader.model, _plain(), ALONE, AS_TEMPLATE)
    assert plain.around()[0] == 1


def _plain():
    from ...conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_states_that_are_not_finite_are_refused(reader, tmp_path):
    with torch.no_grad():
        reader.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(SafeGeneError, match=r"states of a tiny model are NaN or infinite at `1`"):
        read(reader, tmp_path)


def test_a_full_disk_is_named(reader, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SafeGeneError, match=r"No space left on device.*set `TMPDIR`"):
        read(reader, tmp_path)


def test_texts_are_not_held_in_memory(reader, tmp_path, monkeypatch):
    """Each pass gives its states away: of no pass more than one batch is left."""
    monkeypatch.setattr(states, "fitting_answers", lambda *_: 2)
    alive, most = [], []
    passed = states._pass

    def counted(own, begun, group):
        most.append(len(group))
        alive.append(len(group))
        passed(own, begun, group)

    monkeypatch.setattr(states, "_pass", counted)
    read(reader, tmp_path, texts=TEXTS * 4)
    assert max(most) == 2 and sum(alive) == 28


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_all_texts_begin_with_is_read_once(kind, tokenizer, tmp_path, monkeypatch):
    """Where a model keeps the keys and values of all tokens; a sliding window does not."""
    reader = Reader(kind, make_model(kind), tokenizer, ALONE, AS_TEMPLATE)
    read_tokens = []
    reader.model.model.register_forward_pre_hook(
        lambda _, args, given: read_tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(states, "fitting_answers", lambda *_: 1)
    read(reader, tmp_path)
    whole = sum(map(len, reader.tokens(TEXTS)))
    once = 1 if kind == "gemma2" else 1 - len(TEXTS)
    assert sum(read_tokens) == whole + once
