"""Tables of settings from the code's own docstrings, and what mkdocs does to links.

    python .ci/docs_hooks.py    # writes the tables anew

On the page of settings the table of a dataclass stands between `<!-- settings: package.module.Class
-->` and `<!-- end -->`. Links to files outside of docs/ are for people who read in the repository; on the site their paths
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
SETTINGS = ROOT / "docs" / "configuration.md"
PICTURE = re.compile(r"(!\[[^\]]*\])\(\.\./([^)]+/)?([^/)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        for _, folder, name in PICTURE.findall(page.content_string):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / folder / name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = PICTURE.sub(r"\1(\3)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", _path, markdown)


def with_tables(text: str) -> str:
    """The text of the page of settings with its tables as the code has them."""
    place = re.compile(r"(<!-- settings: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


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


if __name__ == "__main__":
    SETTINGS.write_text(with_tables(SETTINGS.read_text(encoding="utf-8")), encoding="utf-8")
