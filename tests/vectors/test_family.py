"""What belongs to a vector's family: added tokens and wrappers do, other tokenizers do not."""

import json

import pytest
from safetensors.torch import load_file, save_file

from safegene_trl import SafeGeneError
from safegene_trl.models.parameters import canonical_modules, canonical_parameters
from safegene_trl.provenance import sha256_of_json
from safegene_trl.vectors.family import Family
from safegene_trl.vectors.files import HASHED_FILES, file_record
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import make_model, make_tokenizer
from ..wrappers import make_wrapper, text_model, wrapper_vector


def with_rows(rows):
    model = make_model()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture
def family(vector_dir) -> Family:
    """As it is read from a vector: nothing but its record."""
    return SafetyVector.from_pretrained(vector_dir).family


def test_family_of_the_vector(family, tokenizer):
    assert family.check_member(Family.of(make_model(seed=9), tokenizer)) == []
    for model, words in (
        (make_model("qwen2"), "made for LlamaForCausalLM"),
        (make_model(layers=4), "names or shapes differ"),
    ):
        with pytest.raises(SafeGeneError, match=words):
            family.check_member(Family.of(model, tokenizer))
    other_template = make_tokenizer()
    other_template.chat_template = "{{ messages[0]['content'] }}"
    assert (
        "chat template differs" in family.check_member(Family.of(make_model(), other_template))[0]
    )
    other_template.chat_template = None
    with pytest.raises(
        SafeGeneError, match="made with a chat template and the model's tokenizer has none"
    ):
        family.check_member(Family.of(make_model(), other_template))
    plain = Family(**family.to_dict() | {"chat_template": None})
    assert plain.check_member(Family.of(make_model(), other_template)) == []


@pytest.mark.parametrize("rows", [323, 384])
def test_added_tokens_and_resized_embeddings_are_of_the_family(family, rows):
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 320
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    tokenizer.add_tokens(["ünd", 'a "quoted" one'])
    other = Family.of(with_rows(rows), tokenizer)
    assert family.check_member(other) == [] and other.vocab_size == rows
    assert family.added_tokens(other) == ["<|new pad|>", "ünd", 'a "quoted" one']


def test_padded_embeddings_alone_are_of_the_family(family, tokenizer):
    other = Family.of(with_rows(384), tokenizer)
    assert family.check_member(other) == [] and family.added_tokens(other) == []


def test_a_tokenizer_whose_ids_changed_is_refused(family):
    inserted = make_tokenizer(extra=("<|new|>",))  # every later token has another id
    swapped = json.loads(make_tokenizer()._tokenizer.to_str())
    ids = swapped["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    renamed = make_tokenizer()
    renamed._tokenizer = type(renamed._tokenizer).from_str(json.dumps(swapped))
    renamed.add_tokens(["<|more|>"])
    for tokenizer in (inserted, renamed):
        with pytest.raises(SafeGeneError, match="by more than added tokens"):
            family.check_member(Family.of(with_rows(384), tokenizer))


def test_a_token_without_an_embedding_is_refused(family, tokenizer):
    more = make_tokenizer()
    more.add_tokens(["<|new|>"])
    with pytest.raises(SafeGeneError, match=r"'<\|new\|>' has the id 320 and .* 320 rows"):
        family.check_member(Family.of(make_model(), more))
    with pytest.raises(SafeGeneError, match=r"has the id 3\d\d and the model's embedding 300 rows"):
        family.check_member(Family.of(with_rows(300), tokenizer))
    # a family's own token that its own model could not read either, as Gemma 3 has one
    narrow = Family(**family.to_dict() | {"vocab_size": 319})
    assert narrow.check_member(Family.of(with_rows(319), tokenizer)) == []


def test_a_vector_of_either_class_fits_the_other(tokenizer):
    wrapper = make_wrapper()
    text = text_model("gemma3", wrapper)
    for maker in (wrapper, text):
        vector = wrapper_vector(maker, tokenizer)
        assert all(name.startswith("model.layers.1.") for name in vector.deltas)
        for model in (wrapper, text):
            assert vector.family.check_member(Family.of(model, tokenizer)) == []
            vector.check_fits(canonical_modules(model))


def as_earlier(vector, model, folder):
    """The vector as an earlier version saved it: names and fingerprint of the whole class."""
    vector.save_pretrained(folder)
    place = folder / "adapter_model.safetensors"
    save_file(
        {
            name.replace("base_model.model.model.", "base_model.model.model.language_model."): part
            for name, part in load_file(place).items()
        },
        place,
    )
    config = json.loads((folder / "safegene_config.json").read_text())
    shapes = {
        part.name: ["vocab" if size == 320 else size for size in part.shape]
        for part in canonical_parameters(model)
    }
    config["family"] |= {
        "architecture": type(model).__name__,
        "fingerprint": sha256_of_json(shapes),
    }
    config["files"] = {name: file_record(folder / name) for name in HASHED_FILES}
    (folder / "safegene_config.json").write_text(json.dumps(config))


def test_vectors_of_earlier_versions_are_read(tokenizer, tmp_path):
    wrapper = make_wrapper()
    as_earlier(wrapper_vector(wrapper, tokenizer), wrapper, tmp_path)
    vector = SafetyVector.from_pretrained(tmp_path)
    assert all(name.startswith("model.layers.1.") for name in vector.deltas)
    assert vector.family.check_member(Family.of(wrapper, tokenizer)) == []
    vector.check_fits(canonical_modules(wrapper))
    with pytest.raises(SafeGeneError, match="made for Gemma3ForConditionalGeneration"):
        vector.family.check_member(Family.of(text_model("gemma3", wrapper), tokenizer))
