"""Signatures of safety vectors, by OpenSSF's `model-signing` with an elliptic-curve key; works
offline.

The hashes inside a vector show that its files belong together. Only a signature shows who made
them. The library reads folders. Files in memory are put into a private folder for it, so that what
is verified is what is used, whatever happens to the files they were read from.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.scratch import scratch_folder
from ..errors import SafeGeneError, SignatureError


SIGNATURE_FILE = "model.sig"


def sign(
    folder: Path, files: tuple[str, ...], private_key: Path, password: str | None = None
) -> Path:
    """Signs `files` of a folder as they are now; returns the signature's path, `model.sig` beside
    them.

    Args:
        folder: The folder.
        files: Names of the signed files, all of which must be there.
        private_key: PEM file of an elliptic-curve key.
        password: Of the key, if it has one.

    Raises:
        SignatureError: A file or the key cannot be read.
    """
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise SignatureError(f"{folder} lacks {missing[0]}: sign a whole safety vector.")
    contents = {name: (folder / name).read_bytes() for name in files}
    (folder / SIGNATURE_FILE).write_bytes(signature_of(contents, private_key, password))
    return folder / SIGNATURE_FILE


def signature_of(
    contents: Mapping[str, bytes], private_key: Path, password: str | None = None
) -> bytes:
    """The signature of files: the content of their `model.sig`.

    Args:
        contents: The files' bytes by name; all of them are signed.
        private_key: PEM file of an elliptic-curve key.
        password: Of the key, if it has one.

    Raises:
        SignatureError: The key cannot be read.
    """
    signing, _, hashing = _model_signing()
    _check_key_file(private_key, "private")
    with _private_copy(contents) as (folder, signature):
        try:
            # the library hands the password on to one that takes bytes only
            secret: Any = password and password.encode()
            signer = signing.Config().use_elliptic_key_signer(
                private_key=private_key, password=secret
            )
            signer.set_hashing_config(_plainly(hashing)).sign(folder, signature)
            return signature.read_bytes()
        except Exception as error:  # the library raises what its parsers raise
            raise SignatureError(
                f"Signing with {private_key} failed ({_first_line(error)}): give an "
                "elliptic-curve private key (P-256, P-384 or P-521) in PEM format, and by `--password_env` the password of one that has it."
            ) from error


def verify(
    contents: Mapping[str, bytes], signature: bytes | None, public_key: Path, name: str
) -> None:
    """Checks that files, and no fewer, are as they were signed with the key that belongs to
    `public_key`.

    Args:
        contents: The bytes by name of the files that must be signed.
        signature: The content of their `model.sig`, None where there is none.
        public_key: PEM file.
        name: What the files are, for messages.

    Raises:
        SignatureError: No signature, another key, or a file that was changed, added to or taken
            from the signed ones.
    """
    _, verifying, hashing = _model_signing()
    _check_key_file(public_key, "public")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (
        Exception
    ) as error:  # of the key itself, whatever its parser raises: it says nothing about the files
        raise SignatureError(
            f"{public_key} is no public key ({_first_line(error)}): give the "
            f"elliptic-curve public key (P-256, P-384 or P-521) in PEM format that the maker of {name} has published."
        ) from error
    if signature is None:
        raise SignatureError(
            f"{name} is not signed: sign it by `safegene sign`, or get a signed one."
        )
    try:
        unsigned = set(contents) - _signed_names(signature)
    except Exception as error:
        raise _invalid(name, public_key) from error
    if unsigned:
        raise SignatureError(
            f"The signature of {name} does not cover {min(unsigned)}: sign it by `safegene sign`."
        )
    with _private_copy(contents) as (folder, file):
        try:
            file.write_bytes(signature)
            verifier.set_hashing_config(_plainly(hashing)).verify(folder, file)
        except (
            Exception
        ) as error:  # the library raises what its parsers raise; each means that nothing is proven
            raise _invalid(name, public_key) from error


def _check_key_file(key: Path, kind: str) -> None:
    try:
        key.read_bytes()
    except (OSError, ValueError) as error:
        raise SignatureError(
            f"The {kind} key {key} cannot be read ({getattr(error, 'strerror', None) or error}): name the PEM file of an "
            f"elliptic-curve {kind} key."
        ) from error


def _invalid(name: str, public_key: Path) -> SignatureError:
    """What the library says of it, digests and all, stays the error's cause."""
    return SignatureError(
        f"{name} does not carry a valid signature of {public_key.name}: another key signed it, or something in it was "
        "changed since, so do not use it and get it from its maker again."
    )


@contextmanager
def _private_copy(contents: Mapping[str, bytes]) -> Iterator[tuple[Path, Path]]:
    """A folder with the files and nothing else, and a place for their signature; nobody else can
    enter, removed in the end.
    """
    with scratch_folder("the signature") as place:
        # the library keeps the folder's name
        folder = Path(place) / "vector"
        try:
            folder.mkdir(mode=0o700)
            for name, data in contents.items():
                (folder / name).write_bytes(data)
        except OSError as error:
            raise SignatureError(
                f"{place} cannot hold a copy of the files for the signature ({error.strerror}): free space there, or set `TMPDIR`."
            ) from error
        yield folder, Path(place) / SIGNATURE_FILE


def _signed_names(signature: bytes) -> set[str]:
    """The files that a signature says it covers; the verifier itself leaves out those that the
    signer left out.
    """
    envelope = json.loads(signature)["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def _plainly(hashing: Any) -> Any:
    """Every file of the folder, none of them a link."""
    return hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


def _model_signing() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise SafeGeneError("Signatures need `pip install safegene-trl[sign]`.") from error
    return signing, verifying, hashing


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
