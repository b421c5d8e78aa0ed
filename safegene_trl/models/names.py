"""What the names of modules and coefficients say: layers, components, rank-one parts, and which part
of a model of text and images they are in.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import count, groupby
from statistics import fmean


_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_LABEL = re.compile(r"[\w-]+")  # neither `/` nor `#`, which coefficients' names are read by
_LONGEST_LABEL = 60


# where classes of text and images keep their text model
_TEXT_MODEL = re.compile(r"(?:model\.)?language_model(?:\.(?P<rest>.+))?")


def without_wrapper(name: str) -> str:
    """The name that a module, parameter or coefficient of a text model has where it is not inside a
    class of text and images: `model.layers.0…` for `model.language_model.layers.0…` and
    `language_model.model.layers.0…`; any other name itself.
    """
    found = _TEXT_MODEL.fullmatch(name)
    if found is None:
        return name
    rest = found["rest"] or "model"
    return rest if rest.partition(".")[0] in ("model", "lm_head") else f"model.{rest}"


def text_names(names: Iterable[str]) -> list[str]:
    """Those of a model's own names that belong to its text model: all, but in a class of text and
    images.
    """
    names = list(names)
    inside = {name for name in names if without_wrapper(name) != name}
    return [
        name for name in names if not inside or name in inside or name.split(".")[0] == "lm_head"
    ]


def layer_index(module_name: str) -> int | None:
    """Index of the transformer layer a module belongs to: the first number in its dotted name."""
    match = _LAYER_INDEX.search(module_name)
    return int(match.group(1)) if match else None


def module_kind(module_name: str) -> str:
    """What a module is in its layer, whichever the layer and, of experts, whichever the expert:
    `mlp.experts.*.up_proj`; of a layer's own name nothing, of a module outside of layers its name.
    """
    match = _LAYER_INDEX.search(module_name)
    if match is None:
        return module_name
    rest = module_name[match.end() :]
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", rest)


def expert_name(parameter: str, expert: int) -> str:
    """The name of one expert's matrix in a parameter that holds those of all: `…experts.down_proj[3]`."""
    return f"{parameter}[{expert}]"


def shared_parameter(matrix: str) -> str | None:
    """Of an expert's matrix the parameter that it lies in, None for a module's own weight."""
    return matrix.rpartition("[")[0] if matrix.endswith("]") else None


def layers_of(module_names: Iterable[str]) -> list[int]:
    """Indices of the layers that modules belong to, in order."""
    return sorted({index for name in module_names if (index := layer_index(name)) is not None})


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers in order, for people: `0–3, 7`."""
    # neighbours have the same difference between layer and place
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def by_component(coefficients: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """As people look at coefficients: by component ("" where there is one) and layer or module, of
    rank-one parts the mean.
    """
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in coefficients.items():
        place, _, component = name.partition("#")[0].partition("/")
        parts[component][place].append(value)
    return {
        component: {place: fmean(own) for place, own in places.items()}
        for component, places in parts.items()
    }


def are_of_parts(coefficients: Iterable[str]) -> bool:
    """Whether these are names of rank-one parts' coefficients."""
    return any("#" in name for name in coefficients)


def component_labels(names: Iterable[str]) -> list[str]:
    """What components of these names are called in the names of their coefficients: letters, digits,
    `-` and `_` of each, with a number after those that would be alike: `Illegal_Activity`.
    """
    labels: list[str] = []
    for name in names:
        words = _LABEL.findall(unicodedata.normalize("NFKC", name))
        label = "_".join(words)[:_LONGEST_LABEL].strip("_") or "unnamed"
        numbered = (f"{label}_{number}" for number in count(2))
        labels.append(
            label if label not in labels else next(n for n in numbered if n not in labels)
        )
    return labels


def is_label(text: object) -> bool:
    """Whether a component can be called so in the names of its coefficients."""
    return (
        isinstance(text, str) and len(text) <= 2 * _LONGEST_LABEL and bool(_LABEL.fullmatch(text))
    )
