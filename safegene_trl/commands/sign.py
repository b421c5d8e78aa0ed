"""`safegene sign VECTOR`: signs a safety vector, so that users can check who made it."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.atomic_writes import replace_file
from ..errors import ConfigError
from ..vectors.files import SIGNED_FILES, read_files
from ..vectors.record import read_record
from ..vectors.signing import SIGNATURE_FILE, signature_of
from .output import give
from .plain_parser import PlainParser


def main(argv: Sequence[str]) -> int:
    """Checks the vector, then writes `model.sig` into its folder."""
    parser = PlainParser(prog="safegene sign", description="Sign a safety vector; works offline.")
    parser.add_argument("directory", help="Folder of the safety vector.")
    parser.add_argument(
        "--private_key", required=True, help="PEM file of an elliptic-curve private key."
    )
    parser.add_argument(
        "--password_env", help="Environment variable that holds the key's password."
    )
    arguments = parser.read(argv)
    folder = Path(arguments.directory)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: sign a vector on this machine, then upload it.")
    if arguments.password_env is not None and arguments.password_env not in os.environ:
        raise ConfigError(
            f"The environment variable {arguments.password_env} is not set: put the key's password there."
        )
    password = os.environ.get(arguments.password_env) if arguments.password_env else None
    contents = read_files(arguments.directory)
    read_record(contents, arguments.directory)
    # the bytes that were checked are signed, whatever the files hold by now
    signed = {name: contents[name] for name in SIGNED_FILES}
    signature = signature_of(signed, Path(arguments.private_key), password)
    replace_file(folder / SIGNATURE_FILE, signature.decode())
    place = folder / SIGNATURE_FILE
    give({"vector": str(folder), "signature": str(place)}, f"Signed: {place}")
    return 0
