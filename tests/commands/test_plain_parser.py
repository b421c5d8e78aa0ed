"""Small commands: wrong words are one sentence, and options may be written with dashes."""

import pytest

from safegene_trl.commands.main import main
from safegene_trl.commands.plain_parser import PlainParser
from safegene_trl.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["history", "--plt", "x", "h.jsonl"],
            "There is no option `--plt`; did you mean `--plot`?",
        ),
        (
            ["sign", "--privat-key", "k", "v"],
            "no option `--privat-key`; did you mean `--private_key`",
        ),
        (["verify", "--publickey=k", "v"], "no option `--publickey`; did you mean `--public_key`?"),
        (["similarity", "v", "w", "--jsn", "x"], "no option `--jsn`; did you mean `--json`?"),
        (["combine", "v", "w", "--output-dr=x"], "`--output-dr`; did you mean `--output_dir`?"),
        (["inspect", "--revison", "x", "v"], "no option `--revison`; did you mean `--revision`?"),
        (["estimate", "--jsn", "x", "sft"], "no option `--jsn`; did you mean `--json`?"),
        (
            ["estimate", "--num_processes", "many"],
            "`--num_processes` is 'many': it must be a whole",
        ),
        (
            ["estimate", "--num-processes=0", "sft"],
            "`--num_processes` is 0: it must be at least 1.",
        ),
        (["sign", "v"], "`--private_key` is missing: `--help` says what to give."),
        (["combine"], "`vectors` and `--output_dir` are missing"),
        (["history"], "`file` is missing"),
        (["history", "h", "--plot"], "`--plot` has no value"),
        (["history", "h", "g"], "`g` on the command line is one too many: leave it out."),
        (["similarity"], "`vectors` is missing"),
    ],
)
def test_a_wrong_word_is_one_sentence_without_usage(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith(f"safegene {words[0]}: ")
    assert printed.err.count("\n") == 1 and not printed.out


LONG = "/".join(["x" * 200] * 21)  # 4,220 bytes


@pytest.mark.parametrize("text", [LONG, "x" * 256, "é" * 128])
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{}"],
        ["similarity", "v", "{}"],
        ["history", "h", "--plot={}"],
        ["estimate", "apply", "--model_name_or_path={}"],
        ["init", "m", "--output_dir", "{}"],
        ["apply", "--model_name_or_path", "{}"],
        ["audit", "v", "--output_dir", "{}"],
        ["extract", "--aligned_model", "{}"],
    ],
    ids=lambda words: words[0],
)
def test_a_path_that_no_system_takes_is_one_sentence(words, text, capsys):
    assert main([word.replace("{}", text) for word in words]) == 2
    said = capsys.readouterr().err
    assert "is too long" in said and said.count("\n") == 1


@pytest.mark.parametrize("option", ["--private-key", "--private_key", "--priv"])
@pytest.mark.parametrize("joint", [[" "], ["="]])
def test_an_option_may_be_written_with_dashes_and_cut_short(option, joint):
    parser = PlainParser()
    parser.add_argument("directory")
    parser.add_argument("--private_key", required=True)
    words = f"{option}{joint[0]}a-b".split(" ")
    assert parser.read([*words, "v-w"]).private_key == "a-b"


def test_a_value_with_spaces_is_no_option():
    parser = PlainParser()
    parser.add_argument("--text")
    assert parser.read(["--text", "--not an option"]).text == "--not an option"
    with pytest.raises(ConfigError, match="no option `--not`"):
        parser.read(["--text", "x", "--not"])
