"""Recipes and options: what is accepted, and that nothing unknown is ignored."""

import os
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from safegene_trl.commands.apply_arguments import ApplyArguments
from safegene_trl.commands.main import main
from safegene_trl.commands.parsing import SafeGeneArguments, parse
from safegene_trl.commands.yaml_files import as_yaml, parse_yaml, read_yaml
from safegene_trl.errors import ConfigError
from safegene_trl.extraction.config import ExtractionConfig


TYPES = (ModelConfig, SFTConfig, SafeGeneArguments)
RECIPE = """
model_name_or_path: tiny
output_dir: out
use_cpu: true
bf16: false
learning_rate: 1.0e-3
safegene:
  vector: v
  data:
    num_task_shots: 7
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(*argv):
    return parse(TYPES, [str(item) for item in argv], "safegene sft", "")


def test_recipe_and_overrides(recipe):
    model, training, safegene = run(
        "--config", recipe, "--learning_rate", "0.5", "--safegene.data.num_task_shots", "9"
    )
    assert model.model_name_or_path == "tiny" and training.learning_rate == 0.5
    assert safegene.config.vector == "v" and safegene.config.data.num_task_shots == 9


def test_one_word_config_option(recipe):
    assert run(f"--config={recipe}")[0].model_name_or_path == "tiny"


def test_options_alone():
    *_, safegene = run(
        "--output_dir",
        "o",
        "--use_cpu",
        "--bf16=false",
        "--safegene.vector=v",
        "--safegene.dry_run=true",
    )
    assert safegene.config.vector == "v" and safegene.config.dry_run is True
    *_, safegene = run(
        "--output_dir", "o", "--use_cpu", "--bf16=false", "--safegene", "{vector: v}"
    )
    assert safegene.config.vector == "v"


def test_without_the_block_there_is_no_safety_step():
    assert run("--output_dir", "o", "--use_cpu", "--bf16=false")[-1].config is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "`learning_rat` in the recipe; did you mean `learning_rate`"),
        ("safegen: {}", "did you mean `safegene`"),
    ],
)
def test_unknown_recipe_key(recipe, line, message):
    recipe.write_text(RECIPE + line + "\n")
    with pytest.raises(ConfigError, match=message):
        run("--config", recipe)


def test_unknown_key_in_the_block(recipe):
    recipe.write_text(RECIPE + "    num_task_shot: 3\n")
    with pytest.raises(ConfigError, match="did you mean `num_task_shots`"):
        _ = run("--config", recipe)[-1].config


def test_unknown_options(recipe):
    with pytest.raises(ConfigError, match="`learning-rte` in the command line"):
        run("--config", recipe, "--learning-rte", "1")
    with pytest.raises(ConfigError, match="`stray` on the command line"):
        run("--config", recipe, "stray")


def test_unreadable_recipes(tmp_path):
    for path, text, message in (
        (tmp_path / "missing.yaml", None, "cannot be read"),
        (tmp_path / "broken.yaml", "a: [", "not valid YAML"),
        (tmp_path / "list.yaml", "- a", "must hold keys"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            run("--config", path)
    with pytest.raises(ConfigError, match="needs the path"):
        run("--config")


def test_main_prints_one_line_and_exits_with_2(recipe, capsys):
    recipe.write_text(RECIPE + "learning_rat: 1\n")
    assert main(["sft", "--config", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("safegene sft: Unknown key") and printed.count("\n") == 1
    assert main(["nonsense"]) == 2 and main([]) == 0 and main(["--help"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "bf16: true\n", "key `bf16` twice, on lines 5 and 11: keep one"),
        (RECIPE + "safegene:\n  vector: w\n", "key `safegene` twice, on lines 7 and 11"),
        (RECIPE + "  vector: w\n", "key `vector` twice, on lines 8 and 11"),
        (
            RECIPE + "  gate: {min_refusal_rate: 0.9}\n  gate: {max_incoherent: 0.1}\n",
            "key `gate` twice",
        ),
        (
            RECIPE + "  gate: {min_refusal_rate: 0.9, min_refusal_rate: 0.1}\n",
            "key `min_refusal_rate` twice, on line 11",
        ),
        (
            RECIPE.replace("bf16: false", 'bf16: "false"'),
            "`bf16` is 'false': it must be true or false, without quotes",
        ),
        (RECIPE.replace("use_cpu: true", "use_cpu:"), "`use_cpu` in the recipe has no value"),
        (RECIPE.replace("vector: v", "vector:"), "`vector` in the safegene block has no value"),
        (RECIPE + "  gate:\n", "`gate` in the safegene block has no value"),
        (
            RECIPE + "  gate:\n    min_refusal_rate:\n",
            "`min_refusal_rate` in the gate block has no value",
        ),
        (RECIPE + "  public_key:\n", "`public_key` in the safegene block has no value"),
        (
            RECIPE[: RECIPE.index("safegene")] + "safegene:\n",
            "`safegene` in the recipe has no value",
        ),
        (RECIPE[: RECIPE.index("safegene")] + "safegene: {}\n", "No safety vector"),
        (RECIPE[: RECIPE.index("safegene")] + "safegene: [vector]\n", "block of keys and values"),
        (RECIPE + "env: 3\n", "`env` is 3"),
        (RECIPE + '  dry_run: "no"\n', "without quotes"),
    ],
)
def test_a_recipe_that_cannot_mean_what_it_says(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        _ = run("--config", recipe)[-1].config


def test_numbers_are_read_as_people_write_them(recipe):
    recipe.write_text(
        RECIPE
        + '  search: {sparsity_weight: 1e-3, max_utility_loss: 5E-2}\n  vector_revision: "1e3"\n'
    )
    config = run("--config", recipe)[-1].config
    assert (
        config.search.sparsity_weight,
        config.search.max_utility_loss,
        config.vector_revision,
    ) == (
        1e-3,
        0.05,
        "1e3",
    )


def test_merge_keys_are_no_double_keys():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "It")["b"] == {"x": 3, "y": 2}
    for text in ("{true: 1, yes: 2}", '{"a": 1, "a": 2}'):
        with pytest.raises(ConfigError, match="twice, on line 1"):
            parse_yaml(text, "It")
    for text in ("a: [", "[" * 5000, "a: 1\n---\nb: 2", "? [1]\n: 2"):
        with pytest.raises(ConfigError, match="It is not valid YAML"):
            parse_yaml(text, "It")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n\tb: 2\n", "in line 2: it begins with a tab, so indent it by spaces."),
        ("a: 1\nc:\n  \tb: [1\n", "in line 3: it begins with a tab, so indent it by spaces."),
        (
            "a: 1\nb: [1\nc: 3\n",
            "in line 3: expected ',' or ']', but got ':' (while parsing a flow sequence that begins",
        ),
        ("a: 1\nb: c: d\n", "in line 2: mapping values are not allowed here."),
        (
            'a: 1\nb: "x\n',
            "in line 3: found unexpected end of stream (while scanning a quoted scalar that begins in line 2).",
        ),
        ("a: 1\nb: \x07\n", "in line 2: it holds the character U+0007."),
        ("a: 1\nb: 2020-13-45\n", "in line 2: month must be in 1..12."),
        ("a: 1\nb: *x\n", "in line 2: found undefined alias 'x'."),
    ],
)
def test_a_fault_in_yaml_is_told_with_file_and_line(text, said, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_yaml(tmp_path / "r.yaml", "The recipe")
    assert f"The recipe {tmp_path / 'r.yaml'} is not valid YAML {said}" in str(raised.value)
    assert "unicode string" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "r.yaml", "The recipe")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--safegene.public_key="], "`--safegene.public_key` has no value"),
        (["--safegene.public_key", ""], "has no value"),
        (["--safegene.public_key"], "has no value"),
        (["--safegene.dry_run", "--safegene.seed=1"], "`--safegene.dry_run` has no value"),
        (["--safegene.gate.min_refusal_rate="], "has no value"),
        (["--safegene.gate.min_refusal_rate=null"], "has no value"),
        (["--safegene.gate={}"], "`gate` is empty"),
        (["--safegene="], "`--safegene` has no value"),
        (["--safegene.public_key=null"], "`public_key` in the safegene block has no value"),
        (
            ["--safegene.seed=1", "--safegene.seed=1"],
            "`--safegene.seed` is on the command line twice",
        ),
        (
            ["--safegene.gate={min_refusal_rate: 1}", "--safegene.gate.min_refusal_rate=0"],
            "`safegene.gate.min_refusal_rate` is set twice",
        ),
        (
            ["--safegene.gate.min_refusal_rate=0", "--safegene.gate={min_refusal_rate: 1}"],
            "is set twice",
        ),
        (["--dtype", "float32", "--dtype=bfloat16"], "`--dtype` is on the command line twice"),
        (
            ["--safegene.gate=1", "--safegene.gate.min_refusal_rate=0"],
            "`safegene.gate` is set twice",
        ),
        (["--safegene", "{seed: 1}", "--safegene.seed", "2"], "`safegene.seed` is set twice"),
        (
            ["--safegene", "{seed: 1}", "--safegene", "{seed: 1}"],
            "`--safegene` is on the command line twice",
        ),
        (["--safegene", '{"seed": 1, "seed": 2}'], "key `seed` twice"),
        (["--safegene", "v"], "block of keys and values"),
        (["--safegene.seed='1'"], "whole number, without quotes"),
        (["--safegene.dry_run='false'"], "without quotes"),
        (
            ["--safegene.vector.x=1"],
            "Unknown key `safegene.vector.x` in the command line; did you mean `safegene.vector`",
        ),
        (["--safegene.seed.=1"], "Unknown key `safegene.seed.`"),
        (["--safegene"], "`--safegene` has no value"),
        (["--safegene.search.max_evaluation=3"], "did you mean `safegene.search.max_evaluations`"),
        (["--safegene.max_evaluation=3"], "did you mean `safegene.search.max_evaluations`"),
        (
            ["--safegene.search={max_evaluations: 1}", "--safegene.max_evaluations=1"],
            "are one setting",
        ),
        (
            ["--safegene", "{search: {max_evaluations: 1}}", "--safegene.max_evaluations=1"],
            "are one setting",
        ),
        (["--safegene.=1"], "Unknown key `safegene.`"),
    ],
)
def test_an_override_that_cannot_mean_what_it_says(recipe, words, message):
    with pytest.raises(ConfigError, match=message):
        _ = run("--config", recipe, *words)[-1].config


def test_text_on_the_command_line_stays_text(recipe):
    words = [
        "--safegene.vector_revision",
        "1234567",
        "--safegene.output.history=12e4",
        "--safegene.output.output_dir=2030-01-01",
    ]
    config = run("--config", recipe, *words)[-1].config
    assert (config.vector_revision, config.output.history, config.output.output_dir) == (
        "1234567",
        "12e4",
        "2030-01-01",
    )
    with_block = run("--config", recipe, "--safegene", "{seed: 3}", "--safegene.dry_run=no")[
        -1
    ].config
    assert (with_block.vector, with_block.seed, with_block.dry_run) == ("v", 3, False)


def test_flat_keys_of_recipe_and_command_line_share_one_warning(recipe, caplog):
    recipe.write_text(RECIPE + "  max_evaluations: 8\n  history: h\n")
    words = [
        "--safegene.search.max_evaluations",
        "3",
        "--safegene.num_safety_shots",
        "9",
        "--safegene.history=g",
    ]
    config = run("--config", recipe, *words)[-1].config
    assert (config.search.max_evaluations, config.data.num_safety_shots, config.output.history) == (
        3,
        9,
        "g",
    )
    assert config.data.num_task_shots == 7
    (said,) = [record.getMessage() for record in caplog.records if "groups" in record.getMessage()]
    assert all(
        place in said
        for place in ("`search.max_evaluations`", "`data.num_safety_shots`", "`output.history`")
    )


@pytest.mark.parametrize(("rank", "said"), [(None, 1), ("0", 1), ("1", 0)])
def test_of_the_processes_of_a_launch_one_warns_of_flat_keys(
    rank, said, recipe, monkeypatch, caplog
):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    recipe.write_text(RECIPE + "  max_evaluations: 8\n")
    assert run("--config", recipe)[-1].config.search.max_evaluations == 8
    assert sum("groups" in record.getMessage() for record in caplog.records) == said


def test_help_lists_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--safegene.search.max_evaluations VALUE Upper limit of loss-and-gradient evaluations"
        in said
    )
    assert (
        "--safegene.gate.min_refusal_rate VALUE Least share" in said
        and "--safegene.vector VALUE" in said
    )
    assert "--safegene.max_evaluations" not in said


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (ExtractionConfig, 'exact_svd: "false"', "`exact_svd` is 'false'.*without quotes"),
        (ExtractionConfig, 'rank: "8"', "`rank` is '8'.*without quotes"),
        (ExtractionConfig, "aligned_revision:", "`aligned_revision` in the recipe has no value"),
        (ExtractionConfig, "isolate_from: one", "a list of strings"),
        (ApplyArguments, "coefficients:", "`coefficients` in the recipe has no value"),
        (ApplyArguments, "base_model: 7", "put it in quotes"),
    ],
)
def test_values_of_this_packages_own_options(tmp_path, kind, line, message):
    (tmp_path / "r.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        parse((kind,), ["--config", str(tmp_path / "r.yaml")], "safegene", "")


def test_own_options_that_are_right(tmp_path):
    (tmp_path / "r.yaml").write_text("rank:\ndistill_learning_rate: 1e-4\nisolate_from: [a, b]\n")
    (config,) = parse((ExtractionConfig,), ["--config", str(tmp_path / "r.yaml")], "safegene", "")
    assert (config.rank, config.distill_learning_rate, config.isolate_from) == (
        None,
        1e-4,
        ["a", "b"],
    )
    (tmp_path / "r.yaml").write_text("coefficients: 0.5\n")
    assert (
        float(
            parse((ApplyArguments,), ["--config", str(tmp_path / "r.yaml")], "safegene", "")[
                0
            ].coefficients
        )
        == 0.5
    )
    with pytest.raises(ConfigError, match="`base_model` is empty"):
        parse((ApplyArguments,), ["--base_model="], "safegene", "")


@pytest.mark.parametrize(
    "path", ["runs/v #2", "#x", "&x", "{a", "@x", "a: b", "1:30", "x # y", "~x"]
)
def test_a_path_on_the_command_line_is_taken_whole(recipe, path):
    """YAML would take the beginning of some, and nothing of others."""
    config = run("--config", recipe, f"--safegene.vector_revision={path}")[-1].config
    assert config.vector_revision == path
    config = run("--config", recipe, f"--safegene.vector_revision='{path}'")[-1].config
    assert config.vector_revision == path


def test_a_broken_block_in_the_recipe_is_refused_whatever_the_command_line_sets(recipe):
    recipe_text = Path(recipe).read_text()
    for line in ("  gate: 0.9\n", "  search:\n"):
        Path(recipe).write_text(recipe_text + line)
        name = line.strip().split(":")[0]
        key = {"gate": "min_refusal_rate=0.5", "search": "max_evaluations=5"}[name]
        with pytest.raises(ConfigError, match=f"`{name}` must be a block of keys and values"):
            _ = run("--config", recipe, f"--safegene.{name}.{key}")[-1].config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("010", 10),
        ("-08", -8),
        ("0x1f", 31),
        ("0o17", 15),
        ("1_000", 1000),
        ("+1.5e3", 1500.0),
        (".5", 0.5),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_a_number_is_what_it_looks_like(text, number):
    """And not octal for a zero in front, or sexagesimal for a colon."""
    found = parse_yaml(f"a: {text}", "It")["a"]
    assert found == number and type(found) is type(number)
    for content in ({"a": text}, {"a": number}):
        written = as_yaml(content)
        assert parse_yaml(written, "It") == content == yaml.safe_load(written)


def test_a_number_of_a_recipe_is_read_once_and_the_same_for_every_option(recipe):
    recipe.write_text(
        RECIPE + "  search: {max_evaluations: 010}\nwarmup_steps: 010\nweight_decay: 1e-3\n"
    )
    _, training, safegene = run("--config", recipe)
    assert safegene.config.search.max_evaluations == training.warmup_steps == 10
    assert training.weight_decay == 1e-3
    assert run("--config", recipe, "--safegene.seed", "010")[-1].config.seed == 10
    with pytest.raises(ConfigError, match="`seed` is '1:30': it must be a whole number"):
        _ = run("--config", recipe, "--safegene.seed", "1:30")[-1].config


def test_a_recipe_s_environment_is_set(recipe, monkeypatch):
    monkeypatch.setenv("OF_A_RECIPE", "before")
    recipe.write_text(RECIPE + "env: {OF_A_RECIPE: 3}\n")
    run("--config", recipe)
    assert os.environ["OF_A_RECIPE"] == "3"


@pytest.mark.parametrize("value", ["-1", "-0.5", "-1e-3", "-.5"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_a_negative_number_is_a_value(value, joint, recipe):
    option = f"--safegene.search.min_coefficient{joint}{value}".split(" ")
    with pytest.raises(ConfigError, match=r"`search\.min_coefficient` is -.*never negative"):
        _ = run("--config", recipe, *option)[-1].config
    option = f"--learning_rate{joint}{value}".split(" ")
    assert run("--config", recipe, *option)[1].learning_rate == float(value)


def test_a_path_may_begin_with_a_dash(recipe):
    assert run("--config", recipe, "--safegene.vector", "-x")[-1].config.vector == "-x"
    assert run("--config", recipe, "--model_name_or_path", "-x")[0].model_name_or_path == "-x"
    with pytest.raises(ConfigError, match="`-x` on the command line belongs to no option"):
        run("--config", recipe, "-x")
    with pytest.raises(
        ConfigError, match=r"`--safegene\.vector` has no value"
    ):  # help, and no path
        run("--config", recipe, "--safegene.vector", "-h")


def test_a_whole_number_of_bytes_on_the_command_line(recipe):
    words = ["--safegene.output.max_shard_size", "1000000"]
    assert run("--config", recipe, *words)[-1].config.output.max_shard_size == "1000.0KB"


@pytest.mark.parametrize(
    "written", ["12e45", "1e400", "08", "0o17", "+.5", "1e-4", "010", "1:30", "0x1f"]
)
def test_text_of_a_trainers_option_stays_as_it_is_written(tmp_path, written, monkeypatch):
    monkeypatch.delenv("SAFEGENE_TEST", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: tiny\nmodel_revision: {written}\noutput_dir: {written}\n"
        f"lora_target_modules: [q, {written}]\nuse_cpu: true\nbf16: false\n"
        f"env: {{SAFEGENE_TEST: {written}}}\n"
    )
    model, training, _ = run("--config", path)
    assert (model.model_revision, training.output_dir) == (written, written)
    assert model.lora_target_modules == ["q", written]
    assert os.environ.pop("SAFEGENE_TEST") == written


@pytest.mark.parametrize("line", ["max_steps: 1e0", "seed: 1e3", "max_steps: .5", "lora_r: 1e1"])
def test_a_whole_number_of_a_trainers_option_is_written_as_one(recipe, line):
    recipe.write_text(f"{RECIPE}\n{line}\n")
    with pytest.raises(ConfigError, match="it must be a whole number"):
        run("--config", recipe)


def test_numbers_of_a_trainers_options_are_what_the_options_take(recipe):
    recipe.write_text(f"{RECIPE}\nmax_steps: 010\nnum_train_epochs: 3\nwarmup_steps: 1e-1\n")
    _, training, _ = run("--config", recipe)
    assert (training.max_steps, training.num_train_epochs) == (10, 3.0)
    assert (training.warmup_steps, training.learning_rate) == (0.1, 1e-3)


@pytest.mark.parametrize("entry", ['"A=B": c', '"": c', 'A: "x\\0y"', '"A\\0": x', "1: a"])
def test_what_is_no_environment_variable_is_refused(recipe, entry):
    recipe.write_text(f"{RECIPE}\nenv: {{{entry}}}\n")
    with pytest.raises(ConfigError, match="`env"):
        run("--config", recipe)


@pytest.mark.parametrize(
    "text", ["!!timestamp x", "!!bool maybe", "!!float 1:30", "!!int 0b11", "!!int x"]
)
def test_a_tag_that_fits_no_value_is_no_yaml(text):
    with pytest.raises(ConfigError, match="not valid YAML in line 1"):
        parse_yaml(f"key: {text}", "The recipe")


def test_tagged_numbers():
    text = "[!!float 1e3, !!float -.INF, !!int 0x10, !!float 1_0.5]"
    assert parse_yaml(text, "It") == [1000.0, float("-inf"), 16, 10.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_steps", "many"], "`--max_steps` is 'many': it must be a whole number."),
        (["--learning-rate=fast"], "`--learning_rate` is 'fast': it must be a number."),
        (["--bf16", "perhaps"], "`--bf16` is 'perhaps': it must be true or false."),
        (["--output_dir"], "`--output_dir` has no value: write one behind it."),
        (["--eval_strategy=never"], "`--eval_strategy` is 'never': use one of"),
        (["--max-stps=3"], "Unknown key `max-stps` in the command line; did you mean `max_steps`?"),
        (["--model=x"], "Unknown key `model` in the command line; did you mean `model_name_or"),
        (["--accelerate_confg=ddp"], "; did you mean `accelerate_config`?"),
        (["--confg=r.yaml"], "; did you mean `config`?"),
        (["--safegene.vec=x"], "; did you mean `safegene.vector`?"),
    ],
)
def test_a_wrong_word_is_one_sentence_without_usage(words, message, capsys):
    """Also before what TRL says of its settings on this machine."""
    assert main(["sft", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("safegene sft: ") and message in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_what_trl_refuses_is_the_user_s_setting(monkeypatch, capsys):
    def refusing(self):
        raise ValueError("Your setup doesn't support bf16/gpu. You need to assign use_cpu.\nOr so.")

    monkeypatch.setattr(SFTConfig, "__post_init__", refusing)
    assert main(["sft", "--model_name_or_path=m"]) == 2
    said = capsys.readouterr().err
    assert "are refused (Your setup doesn't support bf16/gpu): on a machine without such" in said
    assert said.count("\n") == 1
    for command in (["sft"], ["estimate", "sft"]):
        assert main(command) == 2
        assert "No model is named" in capsys.readouterr().err


def test_a_wrong_number_of_a_recipe_is_one_sentence(recipe, capsys):
    recipe.write_text(RECIPE + "max_steps: many\n")
    assert main(["sft", "--config", str(recipe)]) == 2
    assert capsys.readouterr().err == (
        "safegene sft: `--max_steps` is 'many': it must be a whole number.\n"
    )
