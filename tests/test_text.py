"""Text of strangers is shown as it is and does nothing; JSON is JSON for every reader."""

import json

import pytest

from safegene_trl.text import (
    code,
    isolated,
    markdown,
    one_line,
    printable,
    printable_values,
    strict_json,
    told_apart,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b31m\u202egnp.exe\u2066", "\\x9b31m\\u202egnp.exe\\u2066"),
        ("line\u2028break\u200b", "line\\u2028break\\u200b"),
        ("\ud800", "\\ud800"),
        ("λ · 漢字 é 👍 1 %", "λ · 漢字 é 👍 1 %"),
        (3, "3"),
    ],
)
def test_every_character_can_be_seen(text, shown):
    assert printable(text) == shown


def test_messages_and_values_of_json():
    assert one_line("first\n  second\r\nthird\x1b ") == "first second third\\x1b"
    assert printable_values({"a\n": ["b\x07", 1, None, {"c": "\x00"}]}) == {
        "a\\n": ["b\\x07", 1, None, {"c": "\\x00"}]
    }


@pytest.mark.parametrize(
    "text",
    [
        "# x",
        "- x",
        "+ x",
        "1. x",
        "12) x",
        "> x",
        "---",
        "===",
        "***",
        "| a | b |",
        "```",
        "    x",
        "<script>x</script>",
        "&lt;",
        "![x](y)",
    ],
)
def test_markdown_is_text_wherever_it_stands(text):
    """Of every mark that would begin something, one is escaped; nothing else but blanks at the ends
    is lost.
    """
    shown = markdown(text)
    assert shown.replace("\\", "") == text.strip() and (
        shown.startswith("\\") or shown[:3] in ("1\\.", "12\\") or shown == "x"
    )
    assert not any(f"{before}{mark}" in f" {shown}" for before in " xab" for mark in "<>`|[!&*#")


def test_markdown_keeps_lines_names_and_links_apart():
    assert markdown("a\n\n# b") == "a \\# b"
    assert (
        markdown("max_over_refusal of meta-llama/Llama-3.2-1B")
        == "max_over_refusal of meta-llama/Llama-3.2-1B"
    )
    assert markdown("_a_ https://x.y www.x.y @you") == "\\_a\\_ https\\://x.y www\\.x.y \\@you"


def test_code_spans_hold_identifiers_only():
    assert code("hf:a/b-1.0#LABEL") == "`hf:a/b-1.0#LABEL`"
    assert (
        code("a`b") == "a\\`b"
        and code("a <b>") == "a \\<b\\>"
        and code("") == ""
        and code("a\n") == "a"
    )


def test_numbers_that_are_not_finite_are_null_and_named():
    value = {"a": float("nan"), "b": {"c/d~": [1.5, float("inf")]}, "e": (1, -float("inf"))}
    text = strict_json(value)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {
        "a": None,
        "b": {"c/d~": [1.5, None]},
        "e": [1, None],
        "not_finite": ["/a", "/b/c~1d~0/1", "/e/1"],
    }
    assert (
        "not_finite" not in strict_json({"a": 1.0})
        and strict_json([float("nan")], indent=None) == "[null]"
    )


def test_surrogates_can_be_written():
    text = strict_json({"name": "\ud800é\U0001f44d"})
    assert text.encode() and "é" in text and json.loads(text) == {"name": "\ud800é\U0001f44d"}


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (0.004, 0.004, ("0.004", "0.004")),
        (0.0041, 0.0044, ("0.0041", "0.0044")),
        (0.00041, 0.00039, ("0.00041", "0.00039")),
        (3.1, 0.412, ("3.100", "0.412")),
        (1e-30, 2e-30, ("1e-30", "2e-30")),
        (float("nan"), float("nan"), ("nan", "nan")),
        (float("inf"), 1.0, ("inf", "1.000")),
    ],
)
def test_two_numbers_are_told_apart(first, second, shown):
    assert told_apart(first, second) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 10 %", "plain 10 %"),
        ("\u05d0\u05d1: 10", "\u2068\u05d0\u05d1\u2069: 10"),
        ("a \u05d0\u05d1 \u05d2, b", "a \u2068\u05d0\u05d1 \u05d2\u2069, b"),
        ("\u0627 1 \u0627", "\u2068\u0627\u2069 1 \u2068\u0627\u2069"),
        ("[\u05d0]", "[\u2068\u05d0\u2069]"),
        ("", ""),
    ],
)
def test_letters_from_right_to_left_stand_apart(text, shown):
    assert isolated(text) == shown
