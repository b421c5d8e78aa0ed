"""Which names a chat template reads: an argument that it never reads changes nothing, and nobody
would notice a misspelt one.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.validation import OF_THE_CALL
from ..errors import ConfigError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unread_names(tokenizer: "PreTrainedTokenizerBase", names: Iterable[str]) -> str:
    """Which of `names` the chat template never reads, as the middle of a sentence that says so and
    which names it does read; empty where it reads them all.
    """
    given = [name for name in names if name not in OF_THE_CALL]
    held = tokenizer.chat_template or {}
    templates = list(held.values()) if isinstance(held, Mapping) else [held]
    read = [_names_read(template) for template in templates if given]
    known = {name: meant for own in read for name, meant in (own or {}).items()}
    unread = [name for name in given if name not in known]
    if not unread or None in read:
        return ""
    left_out = OF_THE_CALL | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    own = sorted(name for name, meant in known.items() if meant and name not in left_out)
    what = f"only {_listed(own)}" if own else "no arguments"
    return f"{_listed(unread)}, which the chat template never reads (it reads {what})"


def check_names(
    tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any], setting: str
) -> None:
    """Raises `ConfigError` if a chat template never reads one of the arguments in `setting`."""
    if unread := unread_names(tokenizer, options):
        raise ConfigError(f"{setting} has {unread}: correct the name, or leave it out.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@functools.lru_cache
def _names_read(template: str) -> dict[str, bool] | None:
    """The names that a template may read from outside, and whether they are meant as arguments:
    those that it sets as well are its own, unless it asks whether they are there. None where it is
    no template, which whoever renders it says.
    """
    from jinja2 import TemplateError, meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        # tags and global names are those that transformers adds
        tree = _compile_jinja_template(template).environment.parse(template)
        read = meta.find_undeclared_variables(tree)
    except TemplateError:
        return None
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    asked = {
        node.node.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d", "none")
        and isinstance(node.node, nodes.Name)
    }
    return {name: name in asked or name not in own for name in read}
