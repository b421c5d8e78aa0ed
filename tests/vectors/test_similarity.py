"""Cosines between vectors against the dense matrices, the command and its plots."""

import json
import shutil

import pytest
import torch
from PIL import Image

from safegene_trl import SafetyVector
from safegene_trl.commands.main import main
from safegene_trl.commands.similarity import short_names
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.reporting.plots import component_maps
from safegene_trl.vectors.components import category_cosines, component_cosines
from safegene_trl.vectors.similarity import cosine

from ..conftest import make_model, make_vector


@pytest.fixture
def vectors(tokenizer, tmp_path):
    places = {"one": {"seed": 1}, "two": {"seed": 2}, "deep": {"seed": 1, "layers": (2,)}}
    for name, options in places.items():
        vector = make_vector(make_model(), tokenizer, **options)
        vector.selection["selected_layers"] = vector.layers
        vector.selection["stability"] = {
            "mean_jaccard": 0.8,
            "inclusion": [0.0, 0.9, 1.0],
            "resamples": 10,
        }
        vector.save_pretrained(tmp_path / name)
    return [tmp_path / name for name in places]


def test_cosine_of_factors_is_that_of_the_matrices(vectors):
    one, two = (SafetyVector.from_pretrained(folder) for folder in vectors[:2])

    def flat(vector, layer):
        names = [name for name in one.deltas if layer is None or f"layers.{layer}." in name]
        return torch.cat([vector.deltas[name].dense().flatten() for name in names])

    for layer in (None, 1, 2):
        expected = torch.nn.functional.cosine_similarity(flat(one, layer), flat(two, layer), dim=0)
        assert cosine(one.deltas, two.deltas, layer) == pytest.approx(float(expected), abs=1e-6)
        assert cosine(one.deltas, one.deltas, layer) == pytest.approx(1)
    assert cosine(one.deltas, two.deltas, 0) is None


def test_command(vectors, tmp_path, capsys):
    files = ["--plot", str(tmp_path / "heat.png"), "--json", str(tmp_path / "table.json")]
    assert main(["similarity", *map(str, vectors), *files]) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())["cosines"]
    assert list(table) == ["overall", "layers.1", "layers.2"] and "one · two" in printed
    assert f"{table['overall'][0][1]:.3f}" in printed and "–" in printed
    assert table["layers.1"][0][2] is None and table["layers.2"][0][0] == pytest.approx(1)
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_a_model_or_vector_is_not_written_over(vectors, tmp_path, capsys):
    place = vectors[0] / "adapter_model.safetensors"
    weights, names = place.read_bytes(), [str(path) for path in vectors]
    table = tmp_path / "table.json"
    for options, message in (
        (["--plot", place], f"{place} is a file of a model or safety vector"),
        (
            [f"--json={vectors[0] / 'safegene_config.json'}"],
            "is a file of a model or safety vector",
        ),
        ([f"--json={table}", "--plot", table], f"{table} is written already by the same command"),
        (["--plot=/dev/null"], "/dev/null is no plain file"),
    ):
        assert main(["similarity", *names, *map(str, options)]) == 2
        assert message in capsys.readouterr().err
    assert place.read_bytes() == weights
    estimate = [
        "apply",
        "--model_name_or_path",
        names[0],
        f"--json={vectors[0] / 'safegene_config.json'}",
    ]
    assert main(["estimate", *estimate]) == 2
    assert "is a file of a model or safety vector" in capsys.readouterr().err
    assert main(["inspect", names[0], "--plot", str(place)]) == 2
    assert place.read_bytes() == weights


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a/one", "b/two"], ["one", "two"]),
        (["a/v", "b/v", "w"], ["a/v", "b/v", "w"]),
        (["x/a/v", "y/a/v", "z/b/v"], ["x/a/v", "y/a/v", "b/v"]),
        (["owner/v", "owner/v"], ["v (1)", "v (2)"]),
        (["v", "a/v"], ["v (1)", "a/v"]),
    ],
)
def test_vectors_in_folders_of_one_name_are_told_apart(names, labels):
    assert short_names(names) == labels


def test_the_table_names_folders_of_one_name_by_what_they_lie_in(vectors, tmp_path, capsys):
    for place in ("a", "b"):
        shutil.copytree(vectors[0], tmp_path / place / "v")
    assert main(["similarity", *(str(tmp_path / place / "v") for place in ("a", "b"))]) == 0
    assert "a/v · b/v" in capsys.readouterr().out


def test_other_family(vectors, tokenizer, tmp_path, capsys):
    make_vector(make_model("qwen2"), tokenizer).save_pretrained(tmp_path / "qwen")
    assert main(["similarity", str(vectors[0]), str(tmp_path / "qwen")]) == 2
    assert "different families" in capsys.readouterr().err


def test_selection_is_plotted(vectors, tmp_path, capsys, vector_dir):
    assert main(["inspect", str(vectors[0]), "--plot", str(tmp_path / "selection.png")]) == 0
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert "mean Jaccard index 0.80" in capsys.readouterr().out
    assert main(["inspect", str(vector_dir), "--plot", str(tmp_path / "none.png")]) == 2
    assert "keeps no stability" in capsys.readouterr().err
    assert main(["inspect", str(vectors[0]), "--plot", str(tmp_path / "no" / "such.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.fixture
def of_components(tokenizer, tmp_path):
    """A vector of a component of rank 2 and two of rank 1, the last of which is zero in layer 2."""
    model = make_model()
    vector = make_vector(model, tokenizer, rank=4)
    vector.extraction = {
        "method": "delta",
        "rank": 4,
        "components": [2, 1, 1],
        "component_names": ["shared", "fraud", "weapons"],
    }
    for name, delta in vector.deltas.items():
        if ".2." in name:
            delta.a[3] = 0
    vector.save_pretrained(tmp_path / "components")
    return vector


def test_cosines_of_components_are_those_of_the_matrices(of_components):
    deltas, parts = of_components.deltas, [slice(0, 2), slice(2, 3), slice(3, 4)]
    tables = component_cosines(deltas, of_components.components)
    assert list(tables) == ["overall", "layers.1", "layers.2"]
    flat = [
        torch.cat([(d.b[:, part] @ d.a[part]).flatten() for d in deltas.values()]) for part in parts
    ]
    for i, one in enumerate(flat):
        for j, two in enumerate(flat):
            expected = torch.nn.functional.cosine_similarity(one, two, dim=0)
            assert tables["overall"][i][j] == pytest.approx(float(expected), abs=1e-5)
    assert tables["layers.2"][2] == [None] * 3 and tables["layers.2"][0][2] is None
    assert tables["layers.1"][2][2] == pytest.approx(1)


def test_command_on_one_vector_compares_its_components(of_components, tmp_path, capsys, vectors):
    files = ["--plot", str(tmp_path / "heat.png"), "--json", str(tmp_path / "table.json")]
    assert main(["similarity", str(tmp_path / "components"), *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "weights" and printed[1].split() == ["1", "2", "3"] and len(printed) == 5
    assert printed[2].startswith("1 shared") and printed[4].startswith("3 weapons")
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["components"] == ["shared", "fraud", "weapons"]
    assert f"{found['cosines']['overall'][0][1]:.3f}" in printed[2]
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert main(["similarity", str(vectors[0])]) == 2
    assert "one of several components" in capsys.readouterr().err


def test_many_components_are_plotted_as_tables(tmp_path):
    table = [[1.0 if i == j else None for j in range(15)] for i in range(15)]
    labels = [f"a $name$ {i}" for i in range(15)]
    component_maps({"weights": (table, labels), "written": (table, labels)}, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.width < 3500 and image.height < 2000


def test_what_categories_write_is_compared_by_direction_over_modules(
    of_components, tmp_path, capsys
):
    deltas = of_components.deltas
    own = {"component": "a", "prompts": 9, "reads_own": 0, "reads_others": 0, "reads_benign": 0}
    record = {"categories": dict.fromkeys(("fraud", "weapons"), own)}
    of_components.extraction |= {"by_category": record}
    of_components.save_pretrained(tmp_path / "by")
    expected = torch.stack(
        [
            torch.nn.functional.cosine_similarity(d.b[:, 2], d.b[:, 3], dim=0)
            for d in deltas.values()
        ]
    ).mean()
    table = category_cosines(deltas, 2)
    assert table[0][1] == pytest.approx(float(expected), abs=1e-6)
    assert table[0][0] == pytest.approx(1) and table[0][1] == table[1][0]
    # a module that stays in what is shared has no say
    name = next(iter(deltas))
    kept = LowRankDelta(deltas[name].a, torch.nn.functional.pad(deltas[name].b[:, :2], (0, 2)))
    others = {key: delta for key, delta in deltas.items() if key != name}
    assert category_cosines(deltas | {name: kept}, 2) == category_cosines(others, 2)
    assert category_cosines({name: kept}, 2) == [[None] * 2] * 2
    files = ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "t.json")]
    assert main(["similarity", str(tmp_path / "by"), *files]) == 0
    assert "what categories write\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["written"] == [
        pytest.approx(row) for row in table
    ]
    assert "beyond what all do" in (tmp_path / "by" / "README.md").read_text()
