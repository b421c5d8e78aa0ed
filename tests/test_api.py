"""What `from safegene_trl import …` gives: documented, on the page of the API, and what the
commands call.
"""

import ast
import inspect
import json
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

import safegene_trl
from safegene_trl import (
    AuditConfig,
    ConfigError,
    EvaluationConfig,
    ExtractionConfig,
    FamilyError,
    SafeGeneCallback,
    SafeGeneConfig,
    SafetyVector,
    apply,
    audit,
    combine,
    evaluate,
    extract,
)
from safegene_trl.commands.main import main
from safegene_trl.distributed.processes import this_job

from .conftest import BENIGN, HARMFUL, make_model, make_vector, refusing, with_lora


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ENTRY = re.compile(
    r"^::: safegene_trl\.(\w+)\n(?:    options:\n      members: \[(.*)\]\n)?", re.MULTILINE
)
LISTED = {name: members.split(", ") if members else [] for name, members in ENTRY.findall(PAGE)}


def test_the_page_lists_what_is_public():
    assert sorted(LISTED) == sorted(safegene_trl.__all__)
    assert set(safegene_trl.__all__) <= set(dir(safegene_trl))


def test_type_checkers_see_what_is_there():
    """What mypy reads under `TYPE_CHECKING` is what is imported when it is asked for."""
    tree = ast.parse(Path(safegene_trl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == safegene_trl._MODULES and sorted(seen) == sorted(safegene_trl.__all__)
    assert (ROOT / "safegene_trl" / "py.typed").is_file()


def documented() -> list[tuple[str, object]]:
    """Everything on the page, members too, by its name there."""
    found = []
    for name, members in LISTED.items():
        owner = getattr(safegene_trl, name)
        found += [
            (name, owner),
            *((f"{name}.{member}", inspect.getattr_static(owner, member)) for member in members),
        ]
    return found


def unwrapped(thing: object) -> object:
    """The function behind a property or a class method."""
    return getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing


@cache
def raises(function: object) -> bool:
    """Whether a function, or the making of an object, raises by its own hand or checks what it is
    given.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if inspect.isclass(function):
        makers = ("__init__", "__post_init__")
        tree.body = [node for node in tree.body[0].body if getattr(node, "name", "") in makers]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(call, "id", getattr(call, "attr", "")) for call in calls]
    checks = any(name.startswith(("check", "read_", "reject_")) for name in names)
    return checks or any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(tree))


def entries(text: str, section: str) -> set[str]:
    """The names of a section of a docstring."""
    body = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    return (
        set(re.findall(r"^ {4}\**(\w+)(?:, (?:\w+))*: ", body[1], re.MULTILINE)) if body else set()
    )


@pytest.mark.parametrize(
    ("name", "thing"), documented(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_public_thing_says_what_it_takes_and_raises(name, thing):
    thing = unwrapped(thing)
    text = inspect.getdoc(thing) if "__doc__" in vars(thing) or inspect.isfunction(thing) else None
    assert text, f"{name} has no docstring"
    own = inspect.isfunction(thing) or "__init__" in vars(thing)
    taken = set(inspect.signature(thing).parameters) - {"self", "cls"} if own else set()
    if name == "Judge":  # a protocol, of which no object is made
        taken = set()
    told = entries(text, "Args") | entries(text, "Attributes")
    assert {each for each in taken if not each.startswith("_")} <= told, (
        f"{name} does not tell of all it takes"
    )
    assert not raises(thing) or entries(text, "Raises"), f"{name} does not tell what it raises"
    named = entries(text, "Raises") - {"SystemExit"}
    assert named <= set(safegene_trl.__all__), f"{name} raises what is not public"


@pytest.mark.parametrize("name", ["extract", "combine", "apply", "evaluate", "audit"])
def test_a_command_calls_the_public_function(name, tmp_path, monkeypatch, vector_dir):
    """And does its work by nothing else."""
    asked = []

    class Reached(Exception):
        pass

    def recorded(*args, **values):
        asked.append((args, values))
        raise Reached

    module = __import__(f"safegene_trl.commands.{name}", fromlist=[name])
    # a command that checks its settings first imports the function afterwards, from where it lies
    late = name == "audit"
    place = __import__(f"safegene_trl.auditing.{name}", fromlist=[name]) if late else module
    assert getattr(place, name) is getattr(safegene_trl, name)
    monkeypatch.setattr(place, name, recorded)
    words = {
        "extract": ["--aligned_model", "a", "--degraded_model", "b", "--seed", "7"],
        "combine": [
            str(vector_dir),
            "b",
            "--output_dir",
            str(tmp_path / "both"),
            "--overwrite_output_dir",
        ],
        "apply": [
            "--model_name_or_path",
            "m",
            "--safegene.vector=v",
            "--coefficients=0.5",
            "--base_model=b",
        ],
        "evaluate": ["--model_name_or_path", "m", "--seed", "7"],
        "audit": ["v", "--seed", "7"],
    }[name]
    with pytest.raises(Reached):
        module.main(words)
    [(args, values)] = asked
    if name == "combine":
        assert args == ([str(vector_dir), "b"], tmp_path / "both", True)
    elif name == "apply":
        assert args == (SafeGeneConfig(vector="v"), "m")
        assert (
            values["coefficients"] == "0.5"
            and values["base_model"] == "b"
            and values["dtype"] == "auto"
        )
        assert (
            values.keys() | {"config", "model_name_or_path"}
            == inspect.signature(apply).parameters.keys()
        )
    else:
        assert args[0].seed == 7


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (extract, ExtractionConfig),
        (evaluate, EvaluationConfig),
        (audit, AuditConfig),
        (SafeGeneCallback, SafeGeneConfig),
    ],
)
def test_what_is_no_config_is_refused_where_it_is_given(function, kind):
    with pytest.raises(
        ConfigError,
        match=rf"{function.__name__} was given 'vector': give it an? {kind.__name__}, as in",
    ):
        function("vector")


def test_apply_refuses_what_cannot_be_meant(vector_dir, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SafeGeneConfig(vector=str(vector_dir))
    for values, message in (
        ({"dtype": "float64"}, "`dtype` is 'float64': use one of auto"),
        ({"coefficients": 0.5, "dtype": "float32"}, "leave out `dtype`"),
        ({}, "data.task_data` is not set"),
    ):
        with pytest.raises(ConfigError, match=message):
            apply(config, model_dir, **values)
    with pytest.raises(ConfigError, match="No model is named"):
        apply(config, "")
    with pytest.raises(ConfigError, match="give it a SafeGeneConfig"):
        apply({"vector": str(vector_dir)}, model_dir)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="by one process: leave out the launcher"):
        apply(config, model_dir, coefficients=0.5)


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    """Each would take itself for the whole job, and all would write one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="The launcher started 2 processes and this one sees 1: call"
    ):
        this_job()
    with pytest.raises(ConfigError, match="init_process_group"):
        extract(ExtractionConfig())


def test_combine_takes_a_list_of_vectors(vector_dir, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"combine was given '.*': give it a list"):
        combine(str(vector_dir), tmp_path / "both")
    for no_list in (3, None):
        with pytest.raises(ConfigError, match=r"combine was given .*: give it a list"):
            combine(no_list, tmp_path / "both")
    for names in ([], [vector_dir]):
        with pytest.raises(ConfigError, match="One vector alone"):
            combine(names, tmp_path / "both")
    with pytest.raises(ConfigError, match="begins so"):
        combine([vector_dir, vector_dir], "~/both")
    assert not (tmp_path / "both").exists()
    make_vector(make_model(), tokenizer, seed=5).save_pretrained(tmp_path / "other")
    vector = combine([vector_dir, tmp_path / "other"], tmp_path / "both")
    assert vector.components == [2, 2] == SafetyVector.from_pretrained(tmp_path / "both").components


@pytest.fixture
def workplace(tmp_path, tokenizer, task_file, monkeypatch):
    """What the page's example reads, by its names there: tiny models, of which the aligned one
    `refuses`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )

    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        )
    make_model().save_pretrained("my-aligned-model")
    tokenizer.save_pretrained("my-aligned-model")
    for name, seed in (("my-degraded-lora", 1), ("my-fine-tune", 2)):
        model = with_lora(make_model(), seed=seed)
        model.peft_config["default"].base_model_name_or_path = "my-aligned-model"
        model.save_pretrained(name)
    return tmp_path


def test_the_example_of_the_page_runs(workplace):
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len(example.splitlines()) <= 10
    found: dict = {}
    exec(compile(example, "docs/api.md", "exec"), found)  # the repository's own page
    assert found["vector"].files == SafetyVector.from_pretrained("vector").files
    assert found["report"] == json.loads(Path("safe/safegene_report.json").read_text())
    assert (
        found["report"]["status"] == "safeguarded"
        and found["report"]["decision"]["outcome"] == "accepted"
    )
    assert found["result"] == json.loads(Path("measured/evaluation.json").read_text())
    assert set(found["result"]["judges"]["refusal_phrases"]["sets"]) == {"harmful", "benign"}


def test_apply_from_python_writes_what_the_command_writes(model_dir, vector_dir, tmp_path, capsys):
    config = SafeGeneConfig(vector=str(vector_dir), output={"output_dir": str(tmp_path / "python")})
    dry = apply(
        SafeGeneConfig(
            vector=str(vector_dir), output={"output_dir": str(tmp_path / "no")}, dry_run=True
        ),
        model_dir,
        coefficients=0.5,
    )
    assert dry["status"] == "prepared" and not (tmp_path / "no").exists()
    report = apply(config, model_dir, coefficients=0.5)
    assert report["status"] == "safeguarded" and set(report["coefficients"].values()) == {0.5}
    assert capsys.readouterr().out == ""
    words = [
        "--model_name_or_path",
        str(model_dir),
        f"--safegene.vector={vector_dir}",
        "--coefficients=0.5",
    ]
    assert main(["apply", *words, f"--safegene.output.output_dir={tmp_path / 'command'}"]) == 0
    weights = [
        (tmp_path / place / "model.safetensors").read_bytes() for place in ("python", "command")
    ]
    assert weights[0] == weights[1]
    assert (
        apply(config, str(model_dir), coefficients=tmp_path / "command")["coefficients"]
        == report["coefficients"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_pickled_shards": "no"}, "`allow_pickled_shards` is"),
        ({"coefficients": True}, "`coefficients` is"),
        ({"coefficients": 0.5, "base_model": "other"}, "`base_model` is read for"),
        ({"base_model": "other"}, "`base_model` is read for"),
    ],
)
def test_apply_refuses_what_it_would_not_read_or_misread(options, message, vector_dir, model_dir):
    """A quoted `no` that counts as yes would run the code of a pickle."""
    with pytest.raises(ConfigError, match=message):
        apply(SafeGeneConfig(vector=str(vector_dir)), model_dir, **options)


def test_combine_refuses_what_it_would_misread(vector_dir, tmp_path):
    for options in ({"overwrite_output_dir": "no"}, {"output_dir": None}, {"output_dir": "."}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
            combine(**{"vectors": [vector_dir, "x"], "output_dir": tmp_path / "out"} | options)
    with pytest.raises(FamilyError, match="twice"):  # a generator is read once
        combine((name for name in [vector_dir, vector_dir]), tmp_path / "out")
