"""The list of prompts: fixed, small, of three kinds; and Gradio is one module's own."""

import ast
from collections import Counter
from pathlib import Path

import safegene_trl
from safegene_trl.demonstration.prompts import KINDS, offered
from safegene_trl.judges.refusal_phrases import is_refusal


def test_the_list_has_some_of_every_kind():
    kinds = Counter(one.kind for one in offered().values())
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 5
    assert sum(kinds.values()) == len(offered()) == 16
    for text, one in offered().items():
        assert one.text == text == one.asked.text and one.asked.kind == "benign"
        assert text.isascii() and len(text) < 80 and not is_refusal(text)


def test_one_module_imports_gradio():
    root = Path(safegene_trl.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            if any(name.partition(".")[0] == "gradio" for name in names):
                found.add(str(file.relative_to(root)))
    assert found == {"demonstration/page.py"}
