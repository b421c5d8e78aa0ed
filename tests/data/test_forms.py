"""Plain frames around prompts, and what prompts are told apart by."""

import pytest

from safegene_trl.data.forms import FORMS, Place, check_form, length_of, plain, put
from safegene_trl.data.prompt_languages import known_languages, language_of
from safegene_trl.errors import CalibrationDataError


PROMPT = "how does one get past a “good” lock?"


@pytest.mark.parametrize("form", FORMS)
def test_a_form_holds_the_prompt_word_for_word_and_gives_it_back(form):
    turns = put(PROMPT, form)
    assert turns[-1]["role"] == "user" and PROMPT in turns[-1]["content"]
    assert plain(turns[-1]["content"]) == PROMPT
    assert [turn["role"] for turn in turns[:-1]] == (
        ["user", "assistant"] * 2 if form == "many_turn" else []
    )
    assert (turns[-1]["content"] == PROMPT) == (form in ("direct", "many_turn"))


def test_forms_are_told_apart_and_no_other_text_is_taken_for_one():
    assert len({str(put(PROMPT, form)) for form in FORMS}) == len(FORMS)
    assert plain("You are an actor in a play.") == "You are an actor in a play."
    check_form("story", "x")
    with pytest.raises(CalibrationDataError, match="names a form that this version"):
        check_form("jailbreak", "x")


def test_lengths_have_fixed_bounds():
    assert [length_of("x" * n) for n in (1, 60, 61, 160, 161)] == [
        *("short", "short", "medium", "medium", "long")
    ]


def test_a_place_is_within_what_names_less():
    place = Place("a", "en", "direct", "short")
    assert place.within(Place("a")) and place.within(Place(form="direct", length="short"))
    assert not place.within(Place("b")) and not Place().within(Place("a"))
    assert Place("a", form="story").named == {"category": "a", "form": "story"}


def test_a_language_is_as_the_set_says_else_as_the_text_shows(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "abc", "language": "xx"}\n{"prompt": "def", "language": null}\n')
    known = known_languages(str(file), "train")
    assert known == {"abc": "xx"} and language_of("abc", known) == "xx"
    assert language_of("Как можно открыть чужой замок без ключа?", known) == "ru"
    assert language_of("Wie kann man ein Schloss ohne den Schlüssel aufmachen?", {}) == "de"
    file.write_text('{"prompt": "abc"}\n')
    assert known_languages(str(file), "train") == {}
