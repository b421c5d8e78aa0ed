"""Which names a chat template reads."""

import pytest

from safegene_trl.errors import ConfigError
from safegene_trl.models.template_names import check_names, unread_names

from ..reasoning_templates import reasoning_tokenizer


TYPO = {"enable_thinkng": False}


def test_a_misspelt_argument_is_refused_with_the_names_that_are_read():
    tokenizer = reasoning_tokenizer("hybrid")
    check_names(tokenizer, {"enable_thinking": False}, "`x`")
    with pytest.raises(ConfigError, match=r"^`x` has `enable_thinkng`.*only `enable_thinking`\)"):
        check_names(tokenizer, TYPO, "`x`")


def test_a_template_may_read_none_and_a_tokenizer_may_have_none():
    tokenizer = reasoning_tokenizer("thinking")
    assert "reads no arguments" in unread_names(tokenizer, {"enable_thinking": False})
    tokenizer.chat_template = None
    assert "reads no arguments" in unread_names(tokenizer, TYPO)
    assert not unread_names(tokenizer, {})


@pytest.mark.parametrize(
    "template",
    [
        "{% set enable_thinkng = enable_thinkng | default(true) %}",
        "{% if not enable_thinkng is defined %}{% set enable_thinkng = 1 %}{% endif %}",
        "{% macro f() %}{{ enable_thinkng }}{% endmacro %}{{ f() }}",
        "{% generation %}{% for m in messages %}{{ enable_thinkng }}{% break %}{% endfor %}"
        "{% endgeneration %}",
        "{% if",  # whoever renders it says what is wrong
        {"default": "", "other": "{{ enable_thinkng }}"},
    ],
)
def test_names_are_found_wherever_a_template_reads_them(template):
    tokenizer = reasoning_tokenizer("hybrid")
    tokenizer.chat_template = template
    assert not unread_names(tokenizer, TYPO)


def test_an_argument_with_a_default_of_the_templates_is_one():
    tokenizer = reasoning_tokenizer("hybrid")
    tokenizer.chat_template = "{% set thinking = thinking | default(true) %}{{ thinking }}"
    assert "(it reads only `thinking`)" in unread_names(tokenizer, TYPO)


def test_a_name_that_a_template_only_sets_is_not_read():
    tokenizer = reasoning_tokenizer("hybrid")
    tokenizer.chat_template = "{% set enable_thinkng = 1 %}{{ enable_thinkng }}{{ bos_token }}"
    assert "reads no arguments" in unread_names(tokenizer, TYPO)
