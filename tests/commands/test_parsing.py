"""Recipes and options: what is accepted, and that nothing unknown is ignored."""

import pytest
from trl import ModelConfig, SFTConfig

from safegene_trl.commands.main import main
from safegene_trl.commands.parsing import SafeGeneArguments, parse
from safegene_trl.errors import ConfigError


TYPES = (ModelConfig, SFTConfig, SafeGeneArguments)
RECIPE = """
model_name_or_path: tiny
output_dir: out
use_cpu: true
bf16: false
learning_rate: 1.0e-3
safegene:
  vector: v
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
    model, training, safegene = run("--config", recipe, "--learning_rate", "0.5", "--safegene.num_task_shots", "9")
    assert model.model_name_or_path == "tiny" and training.learning_rate == 0.5
    assert safegene.config.vector == "v" and safegene.config.num_task_shots == 9


def test_one_word_config_option(recipe):
    assert run(f"--config={recipe}")[0].model_name_or_path == "tiny"


def test_options_alone():
    *_, safegene = run(
        "--output_dir", "o", "--use_cpu", "--bf16=false", "--safegene.vector=v", "--safegene.dry_run=true"
    )
    assert safegene.config.vector == "v" and safegene.config.dry_run is True
    *_, safegene = run("--output_dir", "o", "--use_cpu", "--bf16=false", "--safegene", "{vector: v}")
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
    recipe.write_text(RECIPE + "  num_task_shot: 3\n")
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
