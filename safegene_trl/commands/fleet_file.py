"""`models.yaml` of `safegene apply --fleet`: read and checked as a whole, before anything is
written.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoints.contents import FLEET_STATE, FLEET_WORKSHOP
from ..checkpoints.places import FAILURE_SUFFIXES
from ..config.flat_keys import PLACES, grouped, merged, warn_of_flat_keys
from ..config.settings import SafeGeneConfig
from ..config.validation import (
    LARGEST_COUNT,
    Rule,
    check_values,
    check_written,
    reject_unknown_keys,
    written_place,
)
from ..errors import ConfigError, SafeGeneError
from ..step.apply_with_coefficients import check_measures_nothing
from ..text import printable
from .apply_arguments import ApplyArguments
from .yaml_files import read_yaml


_READ = {  # settings that name what is read, by their groups
    "data": ("safety_data", "task_data"),
    "search": ("warm_start",),
    "gate": ("harmful_data", "benign_data"),
}
_LONGEST_NAME = 200  # bytes, so that its reports have names as well


@dataclass
class Fleet:
    """The content of `models.yaml`.

    Args:
        output_dir: Folder for everything: `NAME/` with each checkpoint, `fleet/NAME.log` with what
            it printed, and `fleet.json`.
        models: One block per fine-tune: `name` (default: the last part of its path), the options of
            `safegene apply`, and a `safegene` block of its own, which goes before the common one.
        safegene: The common block; keys of `SafeGeneConfig`. A `gate` in a model's own block takes
            the place of the common one, with all its limits; other groups are merged key by key.
        memory_gib: Memory for all processes together: of each GPU where there are any, else of the
            machine. Default: 80 % of what is free.
        processes: How many at once, at most. Default: as many as memory allows on GPUs, else one
            per core.
        timeout_minutes: A process that takes longer is ended, and its fine-tune counts as failed.
    """

    output_dir: str
    models: list[dict[str, Any]]
    safegene: dict[str, Any] = field(default_factory=dict)
    memory_gib: float | None = None
    processes: int | None = None
    timeout_minutes: float = 24 * 60.0

    RULES: ClassVar[Mapping[str, Rule]] = {
        "output_dir": Rule(syntax=written_place),
        "memory_gib": Rule(above=0),
        "processes": Rule(at_least=1, at_most=LARGEST_COUNT),
        "timeout_minutes": Rule(above=0),
    }

    @classmethod
    def read(cls, path: Path) -> "Fleet":
        """Raises `ConfigError` for a file that cannot be read, and for anything in it that cannot
        work or does harm.
        """
        content = read_yaml(path, "The fleet")
        models = content.get("models")
        if not content.get("output_dir") or not isinstance(models, list) or not models:
            raise ConfigError(f"The fleet {path} needs `output_dir` and a list of `models`.")
        check_written(content, cls, where=f"the fleet {path}")
        if odd := [entry for entry in models if not isinstance(entry, dict)]:
            raise ConfigError(
                f"`models` holds {odd[0]!r}: every entry must be a block with `model_name_or_path`."
            )
        fleet = cls(**content)
        check_values(fleet)
        fleet.check(path)
        blocks = [fleet.safegene, *(member.get("safegene") or {} for member in fleet.models)]
        warn_of_flat_keys([key for block in blocks for key in grouped(block)[1]])
        return fleet

    def check(self, file: Path) -> None:
        """Raises `ConfigError` for a member whose settings cannot work, or whose places another one
        or the fleet uses.
        """
        names = [self.name_of(member) for member in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"The fleet has two models named {twice[0]}: give each a `name`.")
        recipes = {}
        for name, member in zip(names, self.models, strict=True):
            try:
                recipes[name] = self._checked_recipe(member)
            except SafeGeneError as error:
                raise ConfigError(f"In the fleet's model {name}: {error}") from error
        _check_places(Path(self.output_dir), file, recipes)

    def name_of(self, member: Mapping[str, Any]) -> str:
        """The member's name: that of its folder, its recipe and its log."""
        model = member.get("model_name_or_path")
        if not model or not isinstance(model, str):
            raise ConfigError(
                "Every entry of `models` needs `model_name_or_path`, a directory or hub id."
            )
        name = member.get("name", Path(model).name)
        if not isinstance(name, str):
            raise ConfigError(f"`name` is {name!r}: it must be a string, in quotes.")
        odd = name != Path(name).name or name.startswith(".") or printable(name) != name
        if (
            odd
            or not name
            or len(os.fsencode(name)) > _LONGEST_NAME
            or name in (FLEET_STATE, FLEET_WORKSHOP)
        ):
            raise ConfigError(
                f"`{printable(name)}` cannot be a folder's name: give the model another `name`."
            )
        return name

    def recipe(self, member: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of `safegene apply` for one model."""
        own = {key: value for key, value in member.items() if key not in ("name", "safegene")}
        block: dict[str, Any] = {
            "output": {"output_dir": str(Path(self.output_dir) / self.name_of(member))}
        }
        for part in (self.safegene, member.get("safegene") or {}):
            settings, _ = grouped(part)
            output = settings.get("output")
            if isinstance(output, dict) and output.get("output_dir", "") is None:
                # null stands for the default, which is the fleet's here
                settings["output"] = {k: v for k, v in output.items() if k != "output_dir"}
            # a gate of one's own takes the place of the common one, with all its limits
            if "gate" in settings:
                block.pop("gate", None)
            block = merged(block, settings)
        return own | {"safegene": block}

    def _checked_recipe(self, member: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in member.items() if key not in ("name", "safegene")}
        known = [each.name for each in fields(ApplyArguments) if each.name != "fleet"]
        places = {name: f"safegene.{place}" for name, place in PLACES.items()}
        reject_unknown_keys(own, [*known, "name", "safegene"], "its block", elsewhere=places)
        check_written(own, ApplyArguments, where="its block")
        ApplyArguments(**own)
        if not isinstance(member.get("safegene", {}), dict):
            raise ConfigError("`safegene` must be a block of keys and values.")
        recipe = self.recipe(member)
        config = SafeGeneConfig.from_dict(recipe["safegene"])
        if recipe.get("coefficients") is not None:
            check_measures_nothing(config)
        if config.dry_run:
            raise ConfigError(
                "`dry_run` writes nothing: try one model by `safegene apply`, and leave it out here."
            )
        return recipe


def sources(recipe: Mapping[str, Any]) -> dict[str, str]:
    """All files, folders and hub ids that a recipe reads, by their keys. A history is written to as
    well and not among them.
    """
    block = recipe["safegene"]
    named = {key: recipe.get(key) for key in ("model_name_or_path", "base_model", "coefficients")}
    named |= {key: block.get(key) for key in ("vector", "public_key")}
    for group, keys in _READ.items():
        named |= {f"{group}.{key}": block.get(group, {}).get(key) for key in keys}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def target_of(recipe: Mapping[str, Any]) -> Path:
    """Where a recipe of a member writes."""
    return Path(recipe["safegene"]["output"]["output_dir"])


def _check_places(folder: Path, file: Path, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `ConfigError` where one member's checkpoint would replace what the fleet, or another
    member, writes or reads.
    """
    targets = {name: target_of(recipe) for name, recipe in recipes.items()}
    for name, target in targets.items():
        # what is there, or will be: the fleet's own places, and the fleet file, which must outlive
        # the fleet
        for place, what in (
            (folder / FLEET_STATE, "the fleet's state"),
            (folder / FLEET_WORKSHOP, "the fleet's logs"),
            (file, "the fleet file"),
        ):
            if overlap(target, place):
                raise ConfigError(
                    f"The `output_dir` of {name} and {what} ({place}) are one place: give the model another `name`."
                )
        if overlap(file, folder / FLEET_WORKSHOP / f"{name}.yaml"):
            raise ConfigError(
                f"The fleet file {file} would be overwritten by the recipe of {name}: move it to another folder."
            )
        for other, theirs in targets.items():
            if other == name:
                continue
            if overlap(target, theirs):
                raise ConfigError(
                    f"The models {name} and {other} have one `output_dir` ({target}), or one inside the other's: leave it out, and each has its "
                    "own."
                )
            if any(
                overlap(target.with_name(target.name + suffix), theirs)
                for suffix in FAILURE_SUFFIXES
            ):
                raise ConfigError(
                    f"The report of a failure of {name} would be the folder of {other}: give one another `name`."
                )
            for key, source in _kept(recipes[other]).items():
                if os.path.lexists(source) and overlap(target, Path(source)):
                    raise ConfigError(
                        f"`{key}` of {other} ({source}) is where the checkpoint of {name} goes: choose another place."
                    )


def _kept(recipe: Mapping[str, Any]) -> dict[str, str]:
    history = recipe["safegene"]["output"].get("history")
    return sources(recipe) | ({"output.history": history} if history else {})


def overlap(one: Path, other: Path) -> bool:
    """Whether two places are one, or one lies inside the other, through links as well."""
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return first == second or first in second.parents or second in first.parents
