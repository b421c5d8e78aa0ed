"""Whether a fine-tune started from the weights that its vector was made from."""

import threading

import pytest

from safegene_trl import provenance
from safegene_trl.commands.main import main
from safegene_trl.errors import FamilyError
from safegene_trl.provenance import check_base, model_reference, sha256_of_file

from .conftest import make_model, make_tokenizer, make_vector, with_lora


@pytest.fixture
def bases(tmp_path):
    for name, seed in (("aligned", 0), ("other", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
    return tmp_path / "aligned", tmp_path / "other"


def test_same_and_other_weights(bases, tmp_path):
    aligned, other = bases
    record = model_reference(str(aligned))
    assert record["name"] == "aligned" and str(tmp_path) not in str(record)
    found = check_base(str(aligned), None, record, allow_other=False)
    assert found["is_aligned_model"] is True and found["files"] == record["files"]
    with pytest.raises(
        FamilyError,
        match=r"started from other, .* made from aligned, .* too where they are stored otherwise",
    ):
        check_base(str(other), None, record, allow_other=False)
    found = check_base(str(other), None, record, allow_other=True)
    assert found["is_aligned_model"] is False and found["other_base_allowed"] is True


def test_further_files_may_lie_beside_and_other_names_are_others(bases):
    record = model_reference(str(bases[0]))
    (bases[0] / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    assert check_base(str(bases[0]), None, record, allow_other=False)["is_aligned_model"] is True
    (bases[0] / "model.safetensors").rename(bases[0] / "model-00001-of-00001.safetensors")
    with pytest.raises(FamilyError):
        check_base(str(bases[0]), None, record, allow_other=False)


def test_config_files_may_differ(bases):
    record = model_reference(str(bases[0]))
    (bases[0] / "config.json").write_text((bases[0] / "config.json").read_text() + "\n")
    assert check_base(str(bases[0]), None, record, allow_other=False)["is_aligned_model"] is True


@pytest.mark.parametrize("name", [None, "no/such-model", "/no/such/folder"])
def test_unknown_base_is_said_to_be_unknown(name, bases):
    record = model_reference(str(bases[0]))
    assert check_base(name, None, record, allow_other=False)["is_aligned_model"] is None


def test_files_are_read_side_by_side(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    expected = {file.name: sha256_of_file(file) for file in tmp_path.glob("*.safetensors")}
    both, read = threading.Barrier(2, timeout=60), []

    def waits(file):
        if file.suffix == ".safetensors" and len(read) < 2:
            read.append(file)
            both.wait(60)  # else broken: nobody came
        return sha256_of_file(file)

    monkeypatch.setattr(provenance, "sha256_of_file", waits)
    found = model_reference(str(tmp_path))["files"]
    assert len(read) == 2 < len(expected) and expected.items() <= found.items()


def test_hashes_of_the_hub_cache_are_taken_from_its_names(bases, tmp_path):
    file = bases[0] / "model.safetensors"
    blob = tmp_path / sha256_of_file(file)
    file.rename(blob)
    file.symlink_to(blob)
    expected = model_reference(str(bases[0]))["files"]["model.safetensors"]
    blob.write_bytes(b"")  # not read again
    assert model_reference(str(bases[0]))["files"]["model.safetensors"] == expected == blob.name


def test_apply_refuses_another_revision_unless_told(bases, tmp_path, capsys):
    tokenizer = make_tokenizer()
    vector = make_vector(make_model(), tokenizer)
    vector.aligned_model = model_reference(str(bases[0]))
    vector.save_pretrained(tmp_path / "vector")
    adapted = with_lora(make_model(seed=1))
    adapted.peft_config["default"].base_model_name_or_path = str(bases[1])
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    words = ["apply", "--model_name_or_path", str(tmp_path / "adapter"), "--coefficients", "1"]
    words += [
        f"--safegene.vector={tmp_path / 'vector'}",
        f"--safegene.output.output_dir={tmp_path / 'out'}",
    ]
    assert main(words) == 2
    assert (
        "set `allow_other_base: true`" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
    assert main([*words, "--safegene.allow_other_base=true"]) == 0
    assert '"is_aligned_model": false' in (tmp_path / "out" / "safegene_report.json").read_text()
