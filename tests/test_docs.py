"""What the documents name is there."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_the_documents_name_is_there():
    named = set()
    for page in (ROOT / "docs").glob("*.md"):
        named |= set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", page.read_text(encoding="utf-8")))
    assert len(named) > 100
    gone = []
    for file, name in sorted(named):
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            gone.append(f"{file}::{name}")
    assert not gone
