"""`safegene verify VECTOR`: checks a safety vector's signature and content."""

from collections.abc import Sequence
from pathlib import Path

from ..vectors.files import read_files
from ..vectors.record import read_record
from .output import give
from .plain_parser import PlainParser


def main(argv: Sequence[str]) -> int:
    """Exit code 0 only for a vector that is signed with the key and whole."""
    parser = PlainParser(prog="safegene verify", description="Check a safety vector's signature.")
    parser.add_argument("directory", help="Safety vector: folder or hub id.")
    parser.add_argument("--public_key", required=True, help="PEM file of its maker's public key.")
    parser.add_argument("--revision", help="Branch, tag or commit on the hub.")
    arguments = parser.read(argv)
    contents = read_files(arguments.directory, revision=arguments.revision)
    read_record(contents, arguments.directory, Path(arguments.public_key))
    give(
        {"vector": arguments.directory, "public_key": arguments.public_key, "verified": True},
        f"{arguments.directory} is whole and signed with the key of {arguments.public_key}.",
    )
    return 0
