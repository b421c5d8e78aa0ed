"""What the cards say."""

from safegene_trl.reporting.cards import checkpoint_card
from safegene_trl.vectors.card import vector_card

from ..conftest import make_model, make_vector
from .test_html import report_of


FILE = "safegene_touch_up.safetensors"


def report(**changes):
    return report_of(
        **{"config": {"output": {"output_format": "merged"}, "search": {"granularity": "layer"}}}
        | changes
    )


def test_card_of_a_checkpoint():
    card = checkpoint_card(report(), "nightly")
    assert (card.data.base_model, card.data.base_model_relation) == ("aligned", "merge")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "refusal_rate": 0.9,
        "over_refusal": 0.1333,
        "incoherent": 0.0,
    }
    assert (
        "Outcome: **accepted**" in card.text
        and "| 30.0% [18.1%, 45.4%] | 90.0% [76.9%, 96.0%] |" in card.text
    )
    assert "no proof of safety" in card.text
    assert (
        "On the same prompts: harmful prompts refused by the aligned model itself 95.0% [83.5%, 98.6%]; "
        "lost refusals restored 92.3% [75.9%, 97.9%]; over-refusal above the aligned model 10.0% "
        "[0.0%, 20.0%]." in card.text
    )
    adapter = checkpoint_card(
        report(
            config={"output": {"output_format": "adapter"}, "search": {"granularity": "module"}}
        ),
        "nightly",
    )
    assert (adapter.data.base_model_relation, adapter.data.library_name) == ("adapter", "peft")


def test_card_without_measurements():
    plain = {key: value for key, value in report().items() if key != "measured"}
    card = checkpoint_card(plain, "nightly")
    assert card.data.eval_results is None and "95 % intervals" not in card.text
    assert "Outcome: **accepted without a measurement of refusals**" in card.text
    assert (
        "meant to give it refusals back" in card.text and "that give it refusals" not in card.text
    )


def test_card_of_a_vector_names_what_it_is_weak_in(tokenizer):
    vector = make_vector(make_model(), tokenizer)
    assert "Harm categories" not in vector_card(vector).text
    vector.selection["categories"] = {
        "fraud": {"asked": 8, "refused": 3},
        "violence": {"asked": 9, "refused": 9},
    }
    text = vector_card(vector).text
    assert "fraud (3 of 8), violence (9 of 9)" in text and "weak in those" in text
    vector.extraction["vectors"] = [
        {"selection": vector.selection, "extraction": {}},
        {"selection": vector.selection, "extraction": {}},
    ]
    assert "fraud (6 of 16), violence (18 of 18)" in vector_card(vector).text


HOSTILE = (
    "x\n---\nlicense: mit\n---\n# <script>alert(1)</script> | `a` ![b](http://c) \x1b[2J\ud800"
)


def check_inert(card, before):
    """The front matter ends where it should, and of the text only marks that are escaped are left."""
    text = str(card)
    assert text.encode() and "\x1b" not in text
    assert text.count("\n---\n") == before.count("\n---\n") and "license" not in card.data.to_dict()
    body = card.text
    assert "<script>" not in body and "![b]" not in body and "\\<script\\>" in body
    assert [line for line in body.splitlines() if line.startswith("#")][1:] == [
        line for line in before.splitlines() if line.startswith("## ")
    ]


def test_names_in_the_card_of_a_checkpoint_are_text():
    plain = report()
    for side in ("before", "after"):
        own = plain["measured"][side]["categories"]
        own[HOSTILE] = own["weapons/explosives"]
    hostile = report(
        vector={"name": HOSTILE, "aligned_model": {"name": HOSTILE}},
        base={"name": HOSTILE},
        decision=plain["decision"] | {"reason": HOSTILE},
        measured=plain["measured"] | {"judge": HOSTILE},
    )
    card = checkpoint_card(hostile, HOSTILE)
    check_inert(card, str(checkpoint_card(plain, "x")))
    assert card.data.base_model is None  # the hub would refuse the card
    cells = [line for line in card.text.splitlines() if line.startswith("|")]
    assert any("\\<script\\>" in line for line in cells)
    columns = [line.replace("\\|", "").count("|") - 1 for line in cells]
    assert columns == [3] * 5 + [4] * (len(columns) - 5)  # shares, and refusals by category


def test_names_in_the_card_of_a_vector_are_text(tokenizer):
    vector = make_vector(make_model(), tokenizer)
    vector.selection["categories"] = {"fraud": {"asked": 8, "refused": 3}}
    before = str(vector_card(vector))
    vector.aligned_model["name"] = vector.extraction["method"] = HOSTILE
    vector.selection["categories"] = {HOSTILE: {"asked": 8, "refused": 3}}
    check_inert(vector_card(vector), before)


def test_a_touch_up_is_named_as_a_part_of_the_weights():
    card = checkpoint_card(report(), "nightly").text
    assert f"a low-rank touch-up of rank 8, learned from the same few samples (`{FILE}`" in card
    assert "ab" * 32 in card and "earlier releases" not in card
    found = report(repair={"rung": "vector", "reason": "enough"})
    assert "touch-up" not in checkpoint_card(found, "nightly").text
    found["base"] = found["base"] | {"touch_ups": [{"rank": 8, "sha256": "cd" * 32}]}
    assert "learned so for earlier releases, too (1)" in checkpoint_card(found, "nightly").text


def test_a_checkpoints_card_has_refusals_by_category():
    text = checkpoint_card(report(), "nightly").text
    assert "| Harmful prompts refused, by category | fine-tuned | safeguarded | prompts |" in text
    assert "| weapons/explosives | 30.0% [14.5%, 51.9%] | 90.0% [69.9%, 97.2%] | 20 |" in text
    plain = report()
    for side in ("before", "after"):
        del plain["measured"][side]["categories"]
    assert "by category" not in checkpoint_card(plain, "nightly").text


def test_a_vectors_card_tells_of_its_components(tokenizer):
    vector = make_vector(make_model(), tokenizer)
    assert "## Components" not in vector_card(vector).text
    vector.extraction |= {"components": [1, 1]}
    text = vector_card(vector).text
    assert "\n| 1 0 | 1.00 | " in text and "2 components have coefficients of their own" in text
    own = {"component": "a", "prompts": 9, "reads_own": 0.8, "reads_others": 0.1}
    vector.extraction |= {
        "component_names": ["shared", "a"],
        "by_category": {"categories": {"a": own | {"reads_benign": 0.25}}},
    }
    before = str(vector_card(vector))
    assert "| a | `a` | 9 | 0.80 | 0.10 | 0.25 |" in before and "\n| 1 shared | 1.00 | " in before
    vector.extraction["by_category"]["categories"] = {HOSTILE: own | {"reads_benign": 0.25}}
    vector.aligned_model["name"] = HOSTILE
    check_inert(vector_card(vector), before)
