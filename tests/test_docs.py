"""What the documents name is there."""

import ast
import dataclasses
import functools
import re
import runpy
import typing
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

import safegene_trl as sg
from safegene_trl import SafeGeneConfig
from safegene_trl.commands.main import COMMANDS, main


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


def blocks(language):
    """Every block of code of a language: page and text."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if found[1] == language:
                yield page.relative_to(ROOT), found[2]


def commands():
    """Every `safegene` command that a page shows, without its prompt: page, name and words."""
    shown = [*blocks("bash"), *blocks("")]
    for page, text in shown:
        for line in text.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:\S+=\S+ )*safegene (\w+)(.*)", line.strip())
            if found:
                words = found[2].split("#")[0].split("|")[0].split()
                yield page, found[1], words


@pytest.fixture
def options_of(capsys):
    """What `--help` of a command lists."""

    @functools.cache
    def listed(name):
        with suppress(SystemExit):
            main([name, "--help"])
        return set(re.findall(r"(?<![\w-])--[A-Za-z][\w.]*", capsys.readouterr().out))

    return listed


def test_every_command_that_is_shown_has_these_options(options_of):
    shown = list(commands())
    assert len(shown) > 60 and {name for _, name, _ in shown} <= set(COMMANDS)
    wrong = []
    for page, name, words in shown:
        known = options_of(name)
        if name == "estimate":  # takes the options of the command that it names
            known = known | options_of(words[0])
        given = [word.split("=")[0] for word in words if word.startswith("--")]
        wrong += [f"{page}: safegene {name} {word}" for word in given if word not in known]
        files = [word for word in words if re.match(r"(recipes|examples)/.*\.\w+$", word)]
        wrong += [f"{page}: {file} is not there" for file in files if not (ROOT / file).is_file()]
    assert not wrong


def test_every_block_of_python_is_of_names_that_are_there():
    seen = 0
    for page, text in blocks("python"):
        tree = ast.parse(text.replace("…", "..."), filename=str(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "safegene_trl":
                assert all(hasattr(sg, alias.name) for alias in node.names), page
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else function.id  # type: ignore[attr-defined]
            owner = getattr(sg, name, None)
            if dataclasses.is_dataclass(owner):
                seen += 1
                names = {field.name for field in dataclasses.fields(owner)}
                given = {keyword.arg for keyword in node.keywords} - {None}
                assert given <= names, f"{page}: {name} has no {given - names}"
    assert seen > 8


def test_every_block_of_yaml_has_settings_that_are_there():
    seen = 0
    for page, text in blocks("yaml"):
        found = yaml.safe_load(text.replace("…", "null"))
        settings = found.get("safegene") if isinstance(found, dict) else None
        if not isinstance(settings, dict):
            continue
        seen += 1
        known = keys_of(SafeGeneConfig)
        assert set(written(settings)) <= known, f"{page}: {set(written(settings)) - known}"
    assert seen > 3


def keys_of(owner, before=""):
    found = set()
    for field in dataclasses.fields(owner):
        found.add(before + field.name)
        group = typing.get_type_hints(owner)[field.name]
        for kind in (group, *typing.get_args(group)):
            if dataclasses.is_dataclass(kind):
                found |= keys_of(kind, f"{before}{field.name}.")
    return found


def written(settings, before=""):
    for key, value in settings.items():
        yield before + key
        if isinstance(value, dict) and key in ("data", "search", "measure", "gate", "output"):
            yield from written(value, f"{before}{key}.")


def test_the_tables_of_settings_are_the_code_s():
    """`python .ci/docs_hooks.py` writes them."""
    hooks = runpy.run_path(str(ROOT / ".ci" / "docs_hooks.py"))
    text = hooks["SETTINGS"].read_text(encoding="utf-8")
    assert text.count("<!-- settings:") == text.count("<!-- end -->") > 4
    assert hooks["with_tables"](text) == text and "| `max_coefficient` |" in text
