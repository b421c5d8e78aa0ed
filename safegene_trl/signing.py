"""Signatures of safety vectors, by OpenSSF's `model-signing` with an elliptic-curve key; works offline.

The hashes inside a vector show that its files belong together. Only a signature shows who made them.
"""

import base64
import json
from pathlib import Path
from typing import Any

from .errors import SafeGeneError, SignatureError


SIGNATURE_FILE = "model.sig"


def sign(folder: Path, files: tuple[str, ...], private_key: Path, password: str | None = None) -> Path:
    """Signs `files` of a folder; returns the signature's path, `model.sig` beside them.

    Args:
        folder: The folder.
        files: Names of the signed files, all of which must be there.
        private_key: PEM file of an elliptic-curve key.
        password: Of the key, if it has one.

    Raises:
        SignatureError: A file or the key cannot be read.
    """
    signing, _, hashing = _model_signing()
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise SignatureError(f"{folder} lacks {missing[0]}: sign a whole safety vector.")
    try:
        secret: Any = password and password.encode()  # the library hands it on to one that takes bytes only
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
        signer.set_hashing_config(_only(hashing, folder, files)).sign(folder, folder / SIGNATURE_FILE)
    except (ValueError, TypeError, OSError) as error:
        raise SignatureError(
            f"Signing with {private_key} failed ({error}): give an elliptic-curve private key in PEM format."
        ) from error
    return folder / SIGNATURE_FILE


def verify(folder: Path, files: tuple[str, ...], public_key: Path) -> None:
    """Checks that `files` of a folder, and no fewer, are as they were signed with the key that belongs to `public_key`.

    Raises:
        SignatureError: No signature, another key, or a file that was changed, added to or taken from the signed ones.
    """
    _, verifying, hashing = _model_signing()
    if not public_key.is_file():
        raise SignatureError(f"The public key {public_key} cannot be read: name a PEM file.")
    if not (folder / SIGNATURE_FILE).is_file():
        raise SignatureError(f"{folder} is not signed: sign it by `safegene sign`, or get a signed one.")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(_only(hashing, folder, files)).verify(folder, folder / SIGNATURE_FILE)
        signed = _signed_names(folder / SIGNATURE_FILE)
    except Exception as error:  # the library raises what its parsers raise; each means that nothing is proven
        raise SignatureError(
            f"{folder} does not carry a valid signature of {public_key.name} ({_first_line(error)}): do not use it; get it "
            "from its maker again."
        ) from error
    if missing := set(files) - signed:
        raise SignatureError(f"The signature of {folder} does not cover {min(missing)}: sign it by `safegene sign`.")


def _signed_names(signature: Path) -> set[str]:
    """The files that a verified signature covers; the verifier itself leaves out those that the signer left out."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def _only(hashing: Any, folder: Path, files: tuple[str, ...]) -> Any:
    """A manifest of `files` and nothing else. The hub's cache holds links, whose targets are hashed."""
    others = [path.relative_to(folder) for path in folder.iterdir() if path.name not in files]
    config = hashing.Config().set_ignored_paths(paths=others, ignore_git_paths=True)
    return config.set_allow_symlinks(True)


def _model_signing() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise SafeGeneError("Signatures need `pip install safegene-trl[sign]`.") from error
    return signing, verifying, hashing


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
