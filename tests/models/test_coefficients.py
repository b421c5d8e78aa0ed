"""What coefficients are called and stand for, and what is shown of them."""

import itertools
from typing import get_args

import pytest
import torch

from safegene_trl.config.search import Granularity
from safegene_trl.models.coefficients import CoefficientSpace
from safegene_trl.models.names import by_component
from safegene_trl.reporting.html import render

from ..reporting.test_html import report_of


KINDS = get_args(Granularity)


def test_coefficients_by_component_and_means_of_rank_one_parts():
    assert by_component({"layers.1": 0.5, "layers.2": 0.0}) == {
        "": {"layers.1": 0.5, "layers.2": 0.0}
    }
    assert by_component({"layers.1/0": 0.5, "layers.1/1": 0.2}) == {
        "0": {"layers.1": 0.5},
        "1": {"layers.1": 0.2},
    }
    parts = {"a.up_proj/0#0": 0.2, "a.up_proj/0#1": 0.4, "a.up_proj/1#0": 1.0, "b.up_proj/0#0": 0.0}
    found = by_component(parts)
    assert list(found) == ["0", "1"] and found["1"] == {"a.up_proj": 1.0}
    assert found["0"] == {"a.up_proj": (0.2 + 0.4) / 2, "b.up_proj": 0.0}
    assert by_component({"a#0": 1.0, "a#1": 2.0}) == {"": {"a": 1.5}}


def test_the_page_draws_a_cell_per_module():
    parts = {
        f"{name}#{part}": 0.25 * part for name in ("a.up_proj", "b.up_proj") for part in range(4)
    }
    page = render(report_of(coefficients=parts))
    assert page.count('width="16" height="16"') == 2
    assert "rank-one part (cells show means)" in page
    assert "2 cells: mean 0.38, largest 0.38 at a.up_proj, 0 at 0" in page
    assert page.count("<code>a.up_proj#") == 4  # the table has them all


MODULES = [
    "model.layers.3.mlp.up_proj",
    "model.layers.12.mlp.up_proj",
    "model.layers.3.mlp.down_proj",
]


def test_names_indices_and_values_of_a_space():
    space = CoefficientSpace.of(MODULES, [2], "layer")
    assert space.names == ["layers.3", "layers.12"]
    assert [space.index(module).tolist() for module in MODULES] == [[0, 0], [1, 1], [0, 0]]
    assert space.index(MODULES[0]).dtype == torch.int64
    values = space.values({"layers.12": 0.25, "layers.3": 0.5})
    assert values.dtype == torch.float32 and values.tolist() == [0.5, 0.25]
    assert space.named(values) == {"layers.3": 0.5, "layers.12": 0.25}
    found = space.by_module(space.named(values))
    assert {module: own.tolist() for module, own in found.items()} == dict(
        zip(MODULES, [[0.5, 0.5], [0.25, 0.25], [0.5, 0.5]], strict=True)
    )
    parts = CoefficientSpace.of(MODULES[:1], [1, 2], "rank")
    assert parts.names == [f"{MODULES[0]}/{mark}" for mark in ("0#0", "1#0", "1#1")]


@pytest.mark.parametrize("components", [[2], [1, 2]])
@pytest.mark.parametrize(
    ("coarse", "fine"), list(itertools.combinations_with_replacement(KINDS, 2))
)
def test_a_coarser_coefficient_is_that_of_all_it_stands_for(coarse, fine, components):
    given, wanted = (CoefficientSpace.of(MODULES, components, kind) for kind in (coarse, fine))
    values = {name: float(position) for position, name in enumerate(given.names)}
    refined = wanted.refined(values)
    assert list(refined) == wanted.names
    shared, own = given.by_module(values), wanted.by_module(refined)
    assert all(torch.equal(shared[module], own[module]) for module in MODULES)
    assert given.refined(dict.fromkeys(wanted.names, 0.0)) is None or coarse == fine
    assert wanted.refined(values | {"other": 1.0}) is None
    assert CoefficientSpace.granularity_of(given.names, MODULES, components) == coarse
    assert CoefficientSpace.granularity_of(given.names[1:], MODULES, components) is None


@pytest.mark.parametrize("kind", KINDS)
def test_components_that_have_names_give_them_to_their_coefficients(kind):
    space = CoefficientSpace.of(MODULES, [2, 1], kind, ["shared", "fraud"])
    place = "layers.3" if kind == "layer" else MODULES[0]
    marks = ["shared#0", "shared#1", "fraud#0"] if kind == "rank" else ["shared"] * 2 + ["fraud"]
    assert space.modules[MODULES[0]] == [f"{place}/{mark}" for mark in marks]
    assert set(by_component(dict.fromkeys(space.names, 1.0))) == {"shared", "fraud"}
    found = CoefficientSpace.granularity_of(space.names, MODULES, [2, 1], ["shared", "fraud"])
    assert found == kind
    assert CoefficientSpace.granularity_of(space.names, MODULES, [2, 1]) is None
    fine = CoefficientSpace.of(MODULES, [2, 1], "rank", ["shared", "fraud"])
    assert list(fine.refined(dict.fromkeys(space.names, 0.5))) == fine.names
