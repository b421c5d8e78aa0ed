"""Configs and tokenizers are read alike by transformers 5 and by what is older."""

import json
from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from safegene_trl.checkpoints import portable_files
from safegene_trl.checkpoints.portable_files import save_config, save_processor

from ..sentencepiece_files import save_pieces
from ..test_callback import Processor


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


@pytest.mark.parametrize("original", [{}, {"output_router_logits": True}])
def test_router_logits_that_trl_asks_for_stay_with_the_training(original, saved, tmp_path):
    folder = tmp_path / "mixture"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **original}))
    live = AutoConfig.from_pretrained(folder)
    live.output_router_logits = True
    assert saved(live)[0].get("output_router_logits", False) == bool(original)


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


SIZES = {
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "vocab_size": 320,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
PARTIAL = {"rope_theta": 1e6, "rope_scaling": None, "partial_rotary_factor": 0.5}
NEOX = {"rotary_emb_base": 1e6, "rotary_pct": 0.5, "rope_scaling": LINEAR}
LOCAL = {"rope_theta": 5e6, "rope_scaling": LINEAR, "rope_local_base_freq": 2e4}
MODERN = {"global_rope_theta": 5e6, "local_rope_theta": 2e4}
# model type -> what version 4 says of its rotary embedding, and of that of the model inside it
IN_VERSION_4 = {
    "qwen2": ({"rope_theta": 1e6, "rope_scaling": None}, None),
    "phi3": (PARTIAL, None),
    "stablelm": (PARTIAL, None),
    "glm4": ({**PARTIAL, "head_dim": 8}, None),
    "gpt_neox": (NEOX, None),
    "gemma3_text": ({**LOCAL, "head_dim": 8}, None),
    "modernbert-decoder": (MODERN, None),
    "mistral3": (None, {"model_type": "mistral", "rope_theta": 1e6, "rope_scaling": LINEAR}),
    "gemma3": (None, {"model_type": "gemma3_text", "head_dim": 8, **LOCAL}),
    "qwen2_5_vl": (None, {"rope_theta": 1e6, "rope_scaling": MROPE}),
}
by_architecture = pytest.mark.parametrize("model_type", IN_VERSION_4)


@pytest.fixture
def in_version_4(model_type, tmp_path):
    """The config of an architecture in version 4's words, and the folder where it lies."""
    outside, inside = IN_VERSION_4[model_type]
    content = {"model_type": model_type, "transformers_version": "4.57.6", "use_cache": True}
    content |= {**SIZES, **outside} if inside is None else {"text_config": {**SIZES, **inside}}
    if model_type == "gpt_neox":
        del content["num_key_value_heads"]
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return content, folder


@by_architecture
def test_a_rotary_embedding_left_as_it_was_stays_in_its_words(in_version_4, saved):
    content, folder = in_version_4
    live = AutoConfig.from_pretrained(folder)
    live.safegene = {"coefficients": {}}
    told, read = saved(live)
    expected = {"safegene": live.safegene, "transformers_version": told["transformers_version"]}
    kept = {key: told[key] for key in content.keys() | expected.keys()}
    assert kept == content | expected
    assert "rope_parameters" not in told and "rope_parameters" not in told.get("text_config", {})
    assert _rotary(read) == _rotary(live)


@by_architecture
def test_a_rotary_embedding_without_an_original_is_told_in_both_forms(in_version_4, saved):
    content, folder = in_version_4
    live = AutoConfig.from_pretrained(folder)
    live.name_or_path = ""
    told, read = saved(live)
    assert _rotary(read) == _rotary(live)
    _says(told, content, {})
    level = told.get("text_config", told)
    assert level["rope_parameters"] == _rotary(live)


@by_architecture
def test_a_changed_rotary_embedding_leaves_nothing_stale(in_version_4, saved):
    content, folder = in_version_4
    live = AutoConfig.from_pretrained(folder)
    text = live.get_text_config()
    rotary = deepcopy(text.rope_parameters)
    changed = rotary.get("full_attention", rotary)
    changed["rope_theta"] = 123.0
    names = ("rope_theta", "rotary_emb_base", "global_rope_theta")
    changes = dict.fromkeys(names, 123.0)
    if "partial_rotary_factor" in changed:
        changed["partial_rotary_factor"] = 1.0
        changes |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 1.0)
    text.rope_parameters = rotary
    told, read = saved(live)
    assert _rotary(read) == rotary
    _says(told, content, changes)


@by_architecture
def test_only_what_transformers_uses_is_told_of_a_rotary_embedding(in_version_4, saved):
    content, folder = in_version_4
    live = AutoConfig.from_pretrained(folder)
    live.get_text_config().rope_theta = 123.0  # nobody reads it beside `rope_parameters`
    told, _ = saved(live)
    _says(told, content, {})
    assert "rope_parameters" not in told.get("text_config", told)
    live.name_or_path = ""
    told, read = saved(live)
    _says(told, content, {})
    assert _rotary(read) == _rotary(live)


@pytest.mark.parametrize("model_type", ["stablelm"])
def test_a_part_that_a_rotary_embedding_no_longer_has_is_not_told(in_version_4, saved):
    content, folder = in_version_4
    (folder / "config.json").write_text(json.dumps(content | {"torch_dtype": "float32"}))
    live = AutoConfig.from_pretrained(folder)
    live.rope_parameters = {"rope_type": "default", "rope_theta": 123.0}
    told, read = saved(live)
    assert "torch_dtype" in told  # the rest stays in its words
    assert told["rope_theta"] == 123.0 and told.get("partial_rotary_factor") != 0.5
    assert read.rope_parameters.get("partial_rotary_factor") != 0.5


@pytest.mark.parametrize("model_type", ["qwen2_5_vl"])
def test_what_changed_inside_is_told_where_the_original_had_nothing_inside(in_version_4, saved):
    content, folder = in_version_4
    flat = content | content["text_config"]  # as the first versions wrote it
    del flat["text_config"]
    (folder / "config.json").write_text(json.dumps(flat))
    live = AutoConfig.from_pretrained(folder)
    assert "text_config" not in saved(live)[0]
    live.text_config.rope_parameters = live.text_config.rope_parameters | {"rope_theta": 123.0}
    told, read = saved(live)
    assert told["text_config"]["rope_theta"] == _rotary(read)["rope_theta"] == 123.0


@pytest.mark.parametrize("model_type", ["phi3"])
def test_a_scaling_has_the_three_fields_that_version_4_takes(in_version_4, saved):
    live = AutoConfig.from_pretrained(in_version_4[1])
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 2.5]}
    live.rope_parameters = live.rope_parameters | {
        "rope_type": "longrope",
        "original_max_position_embeddings": live.original_max_position_embeddings,
        **factors,
    }
    told, read = saved(live)
    assert told["rope_scaling"] == {"type": "longrope", **factors}
    assert read.rope_parameters == live.rope_parameters | {"type": "longrope"}


@pytest.mark.parametrize("model_type", ["mistral3"])
@pytest.mark.parametrize("other", [{"rope_theta": 7.0}, {"hidden_size": 64}])
def test_a_difference_in_a_model_inside_is_seen(other, in_version_4, saved, monkeypatch):
    live = AutoConfig.from_pretrained(in_version_4[1])

    def otherwise(config):
        text = {key: value for key, value in config["text_config"].items() if key not in other}
        text.pop("rope_parameters", None)
        return {**config, "text_config": text | other}

    monkeypatch.setattr(portable_files, "_with_rotary_names", otherwise)
    told, read = saved(live)
    assert _rotary(read) == _rotary(live) and read.text_config.hidden_size == 32
    assert "rope_parameters" in told["text_config"]


def _says(told, content, changes):
    """Whether version 4 finds in `told` what it found in `content`, but for the changes."""
    level, original = (form.get("text_config", form) for form in (told, content))
    names = [name for name in original if "rope" in name or "rotary" in name]
    said = {name: level.get(name) for name in names}
    wanted = {name: changes.get(name, original[name]) for name in names}
    if isinstance(said.get("rope_scaling"), dict):  # version 5 names the type of it as well
        wanted["rope_scaling"] = wanted["rope_scaling"] | {
            "rope_type": said["rope_scaling"].get("rope_type")
        }
        said["rope_scaling"] = {"rope_type": None, **said["rope_scaling"]}
    assert said == wanted


def _rotary(config):
    return config.get_text_config().rope_parameters


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
        portable_files, "_with_rotary_names", lambda config: {**config, "hidden_size": 64}
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


def test_a_processors_own_template_is_no_reason_for_another_form(tokenizer, tmp_path):
    processor = Processor(tokenizer)
    processor.chat_template = "another one"
    save_processor(processor, tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "another one"


def test_a_tokenizer_that_would_be_read_otherwise_stays_as_it_was(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(portable_files, "_reads_as", lambda *args: False)
    folder = tmp_path / "saved"
    folder.mkdir()
    save_processor(tokenizer, folder)
    own = _folder(tokenizer, tmp_path / "own") / "tokenizer_config.json"
    assert (folder / "tokenizer_config.json").read_text() == own.read_text()


@pytest.fixture(scope="module")
def with_pieces(tmp_path_factory):
    """A model's folder with a tokenizer of SentencePiece, as Llama 2 and Gemma were released."""
    folder = tmp_path_factory.mktemp("pieces")
    save_pieces(folder)
    return folder


def test_the_file_of_sentencepiece_goes_along(with_pieces, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_pieces)
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    save_processor(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.model"
    assert file.read_bytes() == (with_pieces / "tokenizer.model").read_bytes()
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    number = str(tokenizer.pad_token_id)
    assert told[number]["content"] == "<|new pad|>" and told[number]["special"] is True
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read("sort item 3 into a box") == tokenizer("sort item 3 into a box")
    assert read.added_tokens_decoder == tokenizer.added_tokens_decoder


def test_it_is_looked_for_beside_the_model_that_was_fine_tuned(with_pieces, tmp_path, caplog):
    AutoTokenizer.from_pretrained(with_pieces).save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "tokenizer.model").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    for name, base in (("one", str(with_pieces)), ("other", "")):
        folder = tmp_path / name
        folder.mkdir()
        save_processor(tokenizer, folder, base)
        assert (folder / "tokenizer.model").is_file() is bool(base)
        assert ("llama.cpp's converter" in caplog.text) is not bool(base)


def test_pieces_of_another_tokenizer_are_left_where_they_are(with_pieces, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    save_pieces(other, size=420)
    AutoTokenizer.from_pretrained(with_pieces).save_pretrained(tmp_path / "trained")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    folder = tmp_path / "saved"
    folder.mkdir()
    save_processor(tokenizer, folder, str(other))
    assert not (folder / "tokenizer.model").exists()
    assert "llama.cpp's converter" in caplog.text


def test_pieces_that_change_how_it_is_read_are_taken_away(with_pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(portable_files, "_reads_as", lambda *args: False)
    save_processor(AutoTokenizer.from_pretrained(with_pieces), tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    assert "added_tokens_decoder" not in (tmp_path / "tokenizer_config.json").read_text()


def test_no_other_tokenizer_is_looked_for_on_the_hub(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(portable_files, "cached_file", lambda *args: pytest.fail("looked for"))
    save_processor(tokenizer, tmp_path, "somebody/model")
    assert caplog.text == ""


def _folder(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder
