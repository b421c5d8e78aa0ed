"""The prompts of an audit: published ones, each in several forms, and none that the vector learns
from.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.forms import Place, length_of, plain, put
from ..data.prompt_languages import known_languages, language_of
from ..data.prompts import Prompt, load_prompts, near_duplicates, prompts_used, spread
from ..errors import CalibrationDataError, ConfigError
from ..provenance import sha256_of_json
from ..vectors.audit_file import MOST_PROMPTS, MOST_TEXT
from ..vectors.prompt_rows import rows_of
from ..vectors.safety_vector import SafetyVector
from .config import AuditConfig


logger = logging.getLogger(__name__)
OWN = "the vector's own prompts to measure on"
_OWN_SET = "vector"
MOST_NAMES = 500  # categories, or languages


@dataclass(frozen=True)
class Item:
    """A prompt in a form, and where it belongs."""

    prompt: Prompt
    place: Place


@dataclass(frozen=True)
class AuditPrompts:
    """All that is asked.

    Attributes:
        items: Each prompt in every form.
        sources: Names of the sets.
        left_out: How many prompts were left out, because they repeat what the vector or the
            fine-tune was made with.
    """

    items: list[Item]
    sources: list[str]
    left_out: int

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts as they are asked."""
        return [item.prompt for item in self.items]


def read_items(config: AuditConfig, vector: SafetyVector) -> AuditPrompts:
    """The prompts of a config's data sets, or the vector's own.

    Raises:
        ConfigError: There are none to ask, or too many.
        CalibrationDataError: A set cannot be read, or all its prompts repeat what was learned from.
    """
    if len({Path(name).stem for name in config.harmful_data}) < len(config.harmful_data):
        raise ConfigError("Two prompt sets have one name: rename one of the files.")
    languages: dict[str, str] = {}
    found: list[Prompt] = []
    for source in config.harmful_data:
        found += load_prompts(source, "harmful", config.data_split, config.num_prompts, config.seed)
        languages |= known_languages(source, config.data_split)
    if not config.harmful_data:
        found = _own(config, vector)
    found = _each_once(found)
    learned = [row["prompt"] for row in rows_of(vector.prompts, "harmful", "benign", "border")]
    used = [*learned, *prompts_used(config.exclude_data, config.data_split)]
    # frames around a prompt would hide it
    repeated = near_duplicates([prompt.text for prompt in found], [plain(text) for text in used])
    left = [prompt for i, prompt in enumerate(found) if i not in repeated]
    for name in sorted({prompt.set for prompt in found} - {prompt.set for prompt in left}):
        raise CalibrationDataError(
            f"Every prompt of {name} repeats one that the vector or fine-tune was made with: audit on other prompts."
        )
    if len(repeated) > len(found) / 2:
        logger.warning(
            "%d of %d prompts repeat what the vector or fine-tune was made with and are left out: audit on others.",
            len(repeated),
            len(found),
        )
    items = [item for prompt in left for item in _in_forms(prompt, config.forms, languages)]
    if len(items) > MOST_PROMPTS:
        raise ConfigError(
            f"{len(items):,} prompts would be asked, and an audit holds {MOST_PROMPTS:,}: set `num_prompts`, or fewer `forms`."
        )
    _check_names(items)
    sources = [Path(name).name for name in config.harmful_data] or [OWN]
    return AuditPrompts(items, sources, len(repeated))


def _each_once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Without what an earlier set has as well: no prompt counts twice in a cell."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(key_of(prompt), prompt)
    if again := len(prompts) - len(found):
        logger.warning("%d prompts stand in several sets: each is asked once.", again)
    return list(found.values())


def key_of(prompt: Prompt) -> str:
    """Names what is asked, whatever the set is called: so two audits know their common prompts."""
    return sha256_of_json(list(prompt.messages))[:16]


def _check_names(items: Sequence[Item]) -> None:
    """Raises `CalibrationDataError` for categories and languages that are no names, or of which
    every prompt has its own: no cell would hold anything.
    """
    for kind in ("category", "language"):
        names = {name for item in items if (name := item.place.named.get(kind)) is not None}
        if any(not name.strip() or len(name) > MOST_TEXT for name in names):
            raise CalibrationDataError(
                f"A {kind} of the prompts is empty, or longer than {MOST_TEXT} characters: name it shortly, or leave the field out."
            )
        if len(names) > MOST_NAMES:
            raise CalibrationDataError(
                f"The column `{kind}` of the prompts has {len(names)} values: give one with at most {MOST_NAMES}."
            )


def _own(config: AuditConfig, vector: SafetyVector) -> list[Prompt]:
    rows = [row for row in rows_of(vector.prompts, "measure") if row["kind"] == "harmful"]
    if not rows:
        raise ConfigError(
            f"The safety vector {config.vector} comes without prompts to measure on: name published ones as `harmful_data`."
        )
    prompts = [
        Prompt(
            _OWN_SET,
            "harmful",
            row.get("category"),
            ({"role": "user", "content": row["prompt"]},),
        )
        for row in rows
    ]
    return (
        prompts if config.num_prompts is None else spread(prompts, config.num_prompts, config.seed)
    )


def _in_forms(prompt: Prompt, forms: Sequence[str], languages: Mapping[str, str]) -> list[Item]:
    """A prompt in every form; a conversation stays what it is, and is one of many turns."""
    language = language_of(prompt.text, languages)
    length = length_of(prompt.text)
    if len(prompt.messages) > 1:
        place = Place(prompt.category, language, "many_turn", length)
        return [Item(prompt, place)]
    return [
        Item(
            Prompt(prompt.set, prompt.kind, prompt.category, tuple(put(prompt.text, form))),
            Place(prompt.category, language, form, length),
        )
        for form in forms
    ]
