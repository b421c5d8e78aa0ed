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


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", text)
    assert len(links) > 15
    for target, heading in links:
        path = ROOT / target
        assert path.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {own.lower().replace(" ", "-") for own in headings}, heading
    assert "".join(links[0]) == "benchmarks/results/findings.png"  # the picture comes first
