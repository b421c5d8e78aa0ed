"""What mkdocs does to the pages: tables of settings from the code's own docstrings, and links to
files of the repository.

A page says `<!-- settings: package.module.Class -->` where the table of a dataclass is to stand.
Links to files outside of docs/ are for people who read in the repository; on the site their paths
are shown instead. Pictures from there become part of the site.
"""

import importlib
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from safegene_trl.config.docstrings import meanings


ROOT = Path(__file__).resolve().parents[1]
PICTURE = re.compile(r"(!\[[^\]]*\])\(\.\./([^)]+/)?([^/)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        for _, folder, name in PICTURE.findall(page.content_string):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / folder / name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = re.sub(r"<!-- settings: ([\w.]+) -->", lambda found: table(found[1]), markdown)
    markdown = PICTURE.sub(r"\1(\3)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", _path, markdown)


def _path(found: re.Match) -> str:
    words, path = found[1], found[2]
    return words if path.rsplit("/", 1)[-1] in words else f"{words} (`{path}`)"


def table(name: str) -> str:
    """Key, default and meaning of every field; one that neither docstring nor help text tells about
    is an error.
    """
    module, _, class_name = name.rpartition(".")
    owner = getattr(importlib.import_module(module), class_name)
    said = meanings(owner)
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in fields(owner):
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if is_dataclass(default):  # a group has a table of its own
            default = None
        shown = "" if default is None or default == "" else f"`{default}`"
        meaning = (said[field.name] or field.metadata["help"]).replace("|", "\\|")
        rows.append(f"| `{field.name}` | {shown} | {meaning} |")
    return "\n".join(rows)
