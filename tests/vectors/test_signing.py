"""Signed vectors are told from unsigned and tampered ones, by the released `model-signing`."""

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from safegene_trl import SafeGeneConfig, SafetyVector
from safegene_trl.commands import sign as sign_command
from safegene_trl.commands.main import main
from safegene_trl.errors import ConfigError, SafeGeneError, SignatureError, VectorError
from safegene_trl.provenance import sha256_of_file
from safegene_trl.vectors.files import SIGNED_FILES, WEIGHTS_FILE
from safegene_trl.vectors.signing import SIGNATURE_FILE, sign, signature_of, verify

from ..conftest import make_model, make_tokenizer, make_vector


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs: `maker.pem` with `maker.pub`, `other.pem` with `other.pub`; `locked.pem` is
    the maker's with a password.
    """
    folder = tmp_path_factory.mktemp("keys")
    pem, format = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    other_kind = rsa.generate_private_key(65537, 2048)
    (folder / "rsa.pem").write_bytes(
        other_kind.private_bytes(pem, format, serialization.NoEncryption())
    )
    for name in ("maker", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(pem, format, serialization.NoEncryption())
        )
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
        if name == "maker":
            locked = key.private_bytes(
                pem, format, serialization.BestAvailableEncryption(b"secret")
            )
            (folder / "locked.pem").write_bytes(locked)
    return folder


@pytest.fixture
def signed(vector_dir, keys, tmp_path):
    folder = tmp_path / "vector"
    shutil.copytree(vector_dir, folder)
    sign(folder, SIGNED_FILES, keys / "maker.pem")
    return folder


def test_command_signs_and_verifies(vector_dir, keys, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "vector"
    shutil.copytree(vector_dir, folder)
    verify = ["verify", str(folder), "--public_key", str(keys / "maker.pub")]
    assert main(verify) == 2
    assert "is not signed" in capsys.readouterr().err
    monkeypatch.setenv("PASSWORD", "secret")
    options = ["--private_key", str(keys / "locked.pem"), "--password_env", "PASSWORD"]
    assert main(["sign", str(folder), *options]) == 0
    assert main(verify) == 0
    assert "is whole and signed" in capsys.readouterr().out
    assert main(["verify", str(folder), "--public_key", str(keys / "other.pub")]) == 2
    said = capsys.readouterr().err
    assert "valid signature of other.pub: another key signed it, or something" in said
    assert said.count("\n") == 1 and said.count(". ") == 0


def test_card_and_other_files_may_change_and_links_are_followed(signed, keys, tmp_path):
    (signed / "README.md").write_text("another card")
    (signed / "notes.txt").write_text("new")
    SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")
    cache = tmp_path / "snapshot"  # as the hub's cache keeps a repository
    cache.mkdir()
    for name in (*SIGNED_FILES, SIGNATURE_FILE):
        (cache / name).symlink_to(signed / name)
    SafetyVector.from_pretrained(cache, public_key=keys / "maker.pub")


def change_config(folder):
    config = json.loads((folder / "safegene_config.json").read_text())
    config["selection"]["scores"] = [9.0, 9.0, 9.0]
    (folder / "safegene_config.json").write_text(json.dumps(config))
    SafetyVector.from_pretrained(folder)  # valid in itself: only the signature tells


def change_adapter_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))


def change_signature(folder):
    text = (folder / SIGNATURE_FILE).read_text()
    (folder / SIGNATURE_FILE).write_text(text[: len(text) // 2])


TAMPERINGS = {
    "another valid config": change_config,
    "another adapter config": change_adapter_config,
    "a file is missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "half a signature": change_signature,
    "no signature": lambda folder: (folder / SIGNATURE_FILE).unlink(),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampered_vector_is_refused(tampering, signed, keys):
    TAMPERINGS[tampering](signed)
    with pytest.raises((SignatureError, VectorError)):
        SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")


def test_signature_over_fewer_files_is_refused(signed, keys):
    sign(signed, SIGNED_FILES[:2], keys / "maker.pem")
    with pytest.raises(SignatureError, match="does not cover"):
        SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")


def test_a_link_that_is_flipped_never_passes_another_vector_for_the_signed_one(
    signed, keys, tmp_path
):
    """The folder, and in another run its weights file, is a link that goes to and fro between the
    signed vector and another.
    """
    other, model = tmp_path / "other", make_model()
    make_vector(model, make_tokenizer(), seed=8).save_pretrained(other)
    shutil.copy(signed / SIGNATURE_FILE, other)
    good = SafetyVector.from_pretrained(signed).files
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in (*SIGNED_FILES, SIGNATURE_FILE):
        (mixed / name).symlink_to(signed / name)
    for link, file in ((tmp_path / "link", ""), (mixed / WEIGHTS_FILE, WEIGHTS_FILE)):
        stop, place = threading.Event(), link if not file else mixed

        def flip(link=link, file=file, stop=stop):
            while not stop.is_set():
                for folder in (other, signed):
                    new = tmp_path / "new"
                    new.symlink_to(folder / file)
                    new.replace(link)

        thread = threading.Thread(target=flip)
        thread.start()
        outcomes = Counter()
        try:
            ends = time.monotonic() + 1.5
            while time.monotonic() < ends:
                try:
                    vector = SafetyVector.from_pretrained(place, public_key=keys / "maker.pub")
                except (SignatureError, VectorError):
                    outcomes["refused"] += 1
                else:
                    outcomes["accepted"] += 1
                    assert vector.files == good
        finally:
            stop.set()
            thread.join(10)
        assert outcomes["refused"] > 3 and outcomes["accepted"] > 3, outcomes


def test_the_bytes_that_were_checked_are_signed(vector_dir, keys, tmp_path, monkeypatch):
    folder = shutil.copytree(vector_dir, tmp_path / "vector")
    checked = {name: (folder / name).read_bytes() for name in SIGNED_FILES}
    plain = sign_command.read_record

    def changed_afterwards(*arguments):
        record = plain(*arguments)
        change_adapter_config(folder)
        return record

    monkeypatch.setattr(sign_command, "read_record", changed_afterwards)
    assert main(["sign", str(folder), "--private_key", str(keys / "maker.pem")]) == 0
    signature = (folder / SIGNATURE_FILE).read_bytes()
    verify(checked, signature, keys / "maker.pub", "vector")
    with pytest.raises(SignatureError, match="valid signature"):
        verify(
            {name: (folder / name).read_bytes() for name in SIGNED_FILES},
            signature,
            keys / "maker.pub",
            "vector",
        )


def test_without_a_place_for_temporary_files_it_says_so(signed, keys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    for use in (
        lambda: SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub"),
        lambda: signature_of({"a": b"a"}, keys / "maker.pem"),
    ):
        with pytest.raises(
            SafeGeneError, match=r"No temporary folder .* for the signature \(No such file.*TMPDIR"
        ):
            use()


def test_the_private_copy_is_for_its_owner_alone_and_goes(signed, keys, tmp_path, monkeypatch):
    place, modes = tmp_path / "place", []
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    plain = Path.write_bytes

    def noted(path, data):
        if path.is_relative_to(place):
            modes.append((place / path.relative_to(place).parts[0]).stat().st_mode & 0o777)
        return plain(path, data)

    monkeypatch.setattr(Path, "write_bytes", noted)
    SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")
    change_adapter_config(signed)
    with pytest.raises(SignatureError):
        SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")
    assert len(modes) == 10 and set(modes) == {0o700} and list(place.iterdir()) == []

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SignatureError, match=r"No space left.*TMPDIR"):
        SafetyVector.from_pretrained(signed, public_key=keys / "maker.pub")


def test_configuration(signed, keys, model_dir, tmp_path, capsys):
    with pytest.raises(ConfigError, match="without a `public_key`"):
        SafeGeneConfig(vector="x", require_signature=True)
    words = ["apply", "--model_name_or_path", str(model_dir), "--coefficients", "0.5"]
    words += [f"--safegene.vector={signed}", f"--safegene.output.output_dir={tmp_path / 'out'}"]
    words += ["--safegene.require_signature=true"]
    assert main([*words, f"--safegene.public_key={keys / 'maker.pub'}"]) == 0
    report = json.loads((tmp_path / "out" / "safegene_report.json").read_text())
    assert report["vector"]["signed_by"] == sha256_of_file(keys / "maker.pub")
    change_config(signed)
    assert main([*words, f"--safegene.public_key={keys / 'maker.pub'}"]) == 2
    said = capsys.readouterr().err
    assert "valid signature" in said and "b'" not in said and "igest" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--private_key", "no-such.pem"],
            "key no-such.pem cannot be read (No such file or directory): name the PEM",
        ),
        (["--private_key", "{keys}"], "cannot be read (Is a directory)"),
        (["--private_key", "{keys}/rsa.pem"], "elliptic-curve private key"),
        (["--private_key", "{keys}/maker.pub"], "elliptic-curve private key"),
        (["--private_key", "{keys}/locked.pem"], "by `--password_env` the password"),
        (["--private_key", "{keys}/maker.pem", "--password_env", "NO_SUCH"], "NO_SUCH is not set"),
    ],
)
def test_bad_keys(arguments, message, vector_dir, keys, tmp_path, capsys):
    folder = tmp_path / "vector"
    shutil.copytree(vector_dir, folder)
    assert main(["sign", str(folder), *(word.format(keys=keys) for word in arguments)]) == 2
    assert message in capsys.readouterr().err and not (folder / SIGNATURE_FILE).exists()
    assert main(["verify", str(folder), "--public_key", "no-such.pub"]) == 2
    assert (
        "public key no-such.pub cannot be read (No such file or directory)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("key", ["maker.pem", "rsa.pem", "locked.pem"])
def test_a_file_that_is_no_public_key_says_nothing_about_the_vector(key, signed, keys, capsys):
    assert main(["verify", str(signed), "--public_key", str(keys / key)]) == 2
    said = capsys.readouterr().err
    assert f"{keys / key} is no public key" in said and "do not use it" not in said


def test_names_of_components_are_signed(vector_dir, keys, tmp_path):
    """Who moves a name moves the coefficients of one category to another."""
    vector = SafetyVector.from_pretrained(vector_dir)
    own = {"components": [1, 1], "component_names": ["shared", "fraud"]}
    vector.extraction = vector.extraction | own
    vector.save_pretrained(tmp_path / "vector")
    sign(tmp_path / "vector", SIGNED_FILES, keys / "maker.pem")
    found = SafetyVector.from_pretrained(tmp_path / "vector", public_key=keys / "maker.pub")
    assert found.component_names == ["shared", "fraud"]
    config = json.loads((tmp_path / "vector" / "safegene_config.json").read_text())
    config["extraction"]["component_names"] = ["fraud", "shared"]
    (tmp_path / "vector" / "safegene_config.json").write_text(json.dumps(config))
    with pytest.raises(SignatureError):
        SafetyVector.from_pretrained(tmp_path / "vector", public_key=keys / "maker.pub")
