"""Configs and tokenizers are read alike by transformers 5 and by what is older."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from safegene_trl.checkpoints import portable_files
from safegene_trl.checkpoints.portable_files import save_config, save_processor


LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}
RELEASED = {  # as version 4 wrote it
    "_name_or_path": "somebody/model",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rope_scaling": LLAMA_3,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "vocab_size": 320,
    "notes": {"of": "its makers"},
}


@pytest.fixture
def released(tmp_path):
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RELEASED))
    return folder


@pytest.fixture
def saved(tmp_path):
    def save(config):
        folder = tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        save_config(config, folder)
        return json.loads((folder / "config.json").read_text()), AutoConfig.from_pretrained(folder)

    return save


def test_what_a_fine_tune_left_stays_in_the_words_of_its_own_file(released, saved):
    live = AutoConfig.from_pretrained(released)
    live.use_cache = False  # as a training does
    live.pad_token_id, live.dtype, live.safegene = 7, torch.float16, {"coefficients": {}}
    told, read = saved(live)
    changes = {
        "pad_token_id": 7,
        "torch_dtype": "float16",
        "safegene": {"coefficients": {}},
        "transformers_version": told["transformers_version"],
    }
    expected = RELEASED | changes
    del expected["_name_or_path"]
    assert told == expected
    assert read.rope_parameters == live.rope_parameters and read.dtype == live.dtype


@pytest.mark.parametrize("scaling", [None, LLAMA_3])
def test_the_rotary_base_is_told_in_both_forms(scaling, saved):
    rotary = {"rope_theta": 1e6, **(scaling or {"rope_type": "default"})}
    live = LlamaConfig(rope_parameters=rotary, max_position_embeddings=8192)
    told, read = saved(live)
    assert told["rope_theta"] == 1e6 and told["rope_scaling"] == scaling
    assert told["rope_parameters"] == read.rope_parameters == live.rope_parameters


def test_a_rotary_base_that_was_changed_is_not_told_as_it_was(released, saved):
    live = AutoConfig.from_pretrained(released)
    live.rope_parameters = live.rope_parameters | {"rope_theta": 1e6}
    told, read = saved(live)
    assert told["rope_theta"] == 1e6 and read.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama", "hidden_size": "wide"}'])  # fmt: skip
def test_an_original_that_says_nothing_changes_nothing(content, released, saved):
    live = AutoConfig.from_pretrained(released)
    (released / "config.json").write_text(content)
    told, read = saved(live)
    of_the_run = ("_name_or_path", "transformers_version")
    assert read.to_dict() == live.to_dict() | {key: getattr(read, key) for key in of_the_run}
    assert told["hidden_size"] == 32


def test_what_would_be_read_otherwise_is_written_in_transformers_own_form(
    released, saved, monkeypatch
):
    live = AutoConfig.from_pretrained(released)
    monkeypatch.setattr(
        portable_files, "_with_rotary_base", lambda config: config | {"hidden_size": 64}
    )
    told, read = saved(live)
    assert read.hidden_size == 32 and "rope_parameters" in told and "rope_theta" not in told


def test_a_tokenizer_is_called_as_version_4_calls_it(tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(_folder(tokenizer, tmp_path / "own"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    folder = tmp_path / "saved"
    folder.mkdir()
    save_processor(tokenizer, folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert "extra_special_tokens" not in told
    read = AutoTokenizer.from_pretrained(folder)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read.all_special_ids == tokenizer.all_special_ids


def test_a_tokenizer_that_would_be_read_otherwise_stays_as_it_was(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(portable_files, "_reads_as", lambda *args: False)
    folder = tmp_path / "saved"
    folder.mkdir()
    save_processor(tokenizer, folder)
    own = _folder(tokenizer, tmp_path / "own") / "tokenizer_config.json"
    assert (folder / "tokenizer_config.json").read_text() == own.read_text()


def _folder(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder
