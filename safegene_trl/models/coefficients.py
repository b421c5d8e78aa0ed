"""The space of a vector's coefficients: what they are called, how many there are, and which of them
a module has.

One coefficient stands for a layer, a module, or one of the r rank-one parts of a module's delta; in
a vector of several components, for that of one component. Its name says which: `layers.12`,
`…up_proj`, `…up_proj#3`, and with components `layers.12/0`, `…up_proj/0#3`, or by their labels,
where they have any, `layers.12/fraud`. The experts that lie in one parameter share theirs. Nothing
but this module and `names.py` makes or reads such a name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch

from ..config.search import Granularity
from .names import layer_index, shared_parameter


class CoefficientSpace:
    """The coefficients of one vector at one granularity.

    Attributes:
        granularity: What one coefficient stands for.
        names: Their names, each once, in order; n of them.
        modules: By module name, the names of the coefficients of its r rank-one parts.
    """

    def __init__(
        self,
        modules: Iterable[str],
        components: Sequence[int],
        granularity: Granularity,
        labels: Sequence[str] = (),
    ):
        self.granularity, self._components = granularity, list(components)
        self._labels = list(labels or map(str, range(len(self._components))))
        self.modules = {module: self._of_module(module) for module in modules}
        self.names = list(dict.fromkeys(name for own in self.modules.values() for name in own))
        self._position = {name: index for index, name in enumerate(self.names)}

    @classmethod
    def of(
        cls,
        modules: Iterable[str],
        components: Sequence[int],
        granularity: Granularity,
        labels: Sequence[str] = (),
    ) -> "CoefficientSpace":
        """The space over these modules.

        Args:
            modules: Canonical module names, in order.
            components: Rank of each of the vector's components.
            granularity: What one coefficient stands for.
            labels: What each component is called. Default: its number, from 0.
        """
        return cls(modules, components, granularity, labels)

    def _of_module(self, module: str) -> list[str]:
        # all experts of a parameter share one: few tokens come to each
        own = shared_parameter(module) or module
        place = f"layers.{layer_index(module)}" if self.granularity == "layer" else own
        return [
            place
            + (f"/{label}" if len(self._components) > 1 else "")
            + (f"#{part}" if self.granularity == "rank" else "")
            for label, rank in zip(self._labels, self._components, strict=True)
            for part in range(rank)
        ]

    def index(self, module: str) -> torch.Tensor:
        """Places of a module's coefficients among `names`: int64, `(r,)`."""
        return torch.tensor([self._position[name] for name in self.modules[module]])

    def values(self, by_name: Mapping[str, float]) -> torch.Tensor:
        """Coefficients by name as a float32 vector in the order of `names`."""
        return torch.tensor([by_name[name] for name in self.names], dtype=torch.float32)

    def named(self, values: Iterable[float]) -> dict[str, float]:
        """Values in the order of `names`, by name."""
        return dict(zip(self.names, map(float, values), strict=True))

    def by_module(self, by_name: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Coefficients by name as those (float32, `(r,)`) of every module's rank-one parts."""
        return {
            module: torch.tensor([by_name[name] for name in own])
            for module, own in self.modules.items()
        }

    def refined(self, given: Mapping[str, float]) -> dict[str, float] | None:
        """Coefficients of this granularity, or of a coarser one given to all that each stood for;
        None for any others.
        """
        kind = self.granularity_of(given, self.modules, self._components, self._labels)
        kinds = get_args(Granularity)
        if kind is None or kinds.index(kind) > kinds.index(self.granularity):
            return None
        coarser = CoefficientSpace(self.modules, self._components, kind, self._labels).modules
        return {
            own: given[shared]
            for module, names in self.modules.items()
            for own, shared in zip(names, coarser[module], strict=True)
        }

    @staticmethod
    def granularity_of(
        names: Iterable[str],
        modules: Iterable[str],
        components: Sequence[int],
        labels: Sequence[str] = (),
    ) -> Granularity | None:
        """The granularity at which a vector's coefficients have exactly these names, None where
        there is none.
        """
        wanted, modules = set(names), list(modules)
        for kind in get_args(Granularity):
            if wanted == set(CoefficientSpace(modules, components, kind, labels).names):
                return kind
        return None
