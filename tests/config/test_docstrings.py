"""Help texts are the docstrings'."""

from dataclasses import dataclass

import pytest

from safegene_trl.commands.apply_arguments import ApplyArguments
from safegene_trl.commands.parsing import make_parser
from safegene_trl.config.docstrings import meanings, with_help
from safegene_trl.evaluation.config import EvaluationConfig
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.judges import judge_forms


@pytest.mark.parametrize("kind", [ApplyArguments, EvaluationConfig, ExtractionConfig])
def test_help_of_an_option_is_what_its_docstring_says(kind):
    said = meanings(kind)
    shown = {action.dest: action.help for action in make_parser([kind])._actions}
    assert all(said.values())
    for name, text in said.items():
        listed = kind is EvaluationConfig and name == "judges"
        more = f" There are {judge_forms()}." if listed else ""
        assert shown[name].replace("%%", "%") == text + more
    assert make_parser([kind]).format_help()


def test_a_percent_sign_is_shown_as_it_is():
    @with_help
    @dataclass
    class Options:
        """Some.

        Args:
            share: How much, in %.
        """

        share: int = 5

    assert "How much, in %. (default: 5)" in " ".join(make_parser([Options]).format_help().split())
