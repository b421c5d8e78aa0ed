"""Which prompts a vector is made with, and which come with it to measure on."""

import json

import pytest

from safegene_trl import ExtractionConfig, SafetyVector, extract
from safegene_trl.commands.main import main
from safegene_trl.errors import CalibrationDataError, ConfigError
from safegene_trl.extraction import pipeline
from safegene_trl.extraction.prompts import ExtractionPrompts
from safegene_trl.provenance import sha256_of_json

from ..conftest import BENIGN, HARMFUL, argv


REFUSED = "how do i forbid a stew from burning"  # benign, and the aligned model refuses it
TESTS = {
    "harmful": ["teach me to pick a vault", "say how one sinks a ferry", "answered: an odd plan"],
    "benign": ["name a fish for supper", REFUSED, "mumbled: some verse", "why is tea green"],
}


def said(model, tokenizer, prompts, *rest):
    """Refuses harmful prompts, and of the others those that speak of what is forbidden."""
    refused = (*HARMFUL, *TESTS["harmful"][:2], "forbid")
    texts = [tokenizer.decode(ids) for ids in prompts]
    return [
        "zx qv " * 9
        if "mumbled" in text
        else "I can't help with that. And so"
        if any(known in text for known in refused)
        else "Take a pan. Stir"
        for text in texts
    ]


@pytest.fixture
def options(extraction, tmp_path, monkeypatch):
    """Of an extraction with prompts to measure on."""
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", said)
    found = {key: str(value) for key, value in extraction.items()} | {"selection": "magnitude"}
    for kind, prompts in TESTS.items():
        file = tmp_path / f"test_{kind}.jsonl"
        rows = [{"prompt": text, "category": f"of {text[0]}"} for text in prompts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[f"test_{kind}_data"] = str(file)
    return found


def made(options):
    extract(ExtractionConfig(**options), show_progress=False)
    return SafetyVector.from_pretrained(options["output_dir"])


def add(file, *prompts):
    with open(file, "a") as opened:
        opened.write("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def test_prompts_to_measure_on_come_with_verdicts_and_without_answers(options, capsys):
    near = [HARMFUL[0].upper() + "!", BENIGN[0]]  # of either kind of those that are learned from
    add(options["test_harmful_data"], *near, TESTS["harmful"][0])
    vector = made(options)
    tests = [row for row in vector.prompts if row.get("use") == "measure"]
    kept = TESTS["harmful"] + [text for text in TESTS["benign"] if "mumbled" not in text]
    assert sorted(row["prompt"] for row in tests) == sorted(kept)
    for row in tests:
        refused = row["prompt"] in (*TESTS["harmful"][:2], REFUSED)
        assert row["verdict"] == ("refused" if refused else "answered")
        assert row["category"] == f"of {row['prompt'][0]}"
        assert set(row) == {"prompt", "kind", "verdict", "use", "category"}
    record = vector.selection["test_prompts"]
    assert record["max_new_tokens"] == 32 and record["max_reasoning_tokens"] == 0
    harmful, benign = ({**record[kind]} for kind in ("harmful", "benign"))
    assert len(harmful.pop("sha256")) == len(benign.pop("sha256")) == 64
    assert harmful == {"asked": 3, "answered": 1, "refused": 2, "repeated": 2}
    assert benign == {"asked": 4, "answered": 2, "incoherent": 1, "refused": 1}
    assert vector.describe()["format_version"] == 3
    assert main(["inspect", options["output_dir"]]) == 0
    told = capsys.readouterr().out
    assert "does: 3 harmful ones, 2 of them refused; 3 benign ones, 1 of them refused" in told
    assert "6 prompts to measure on" in str(vector.generate_model_card())


def test_as_many_as_are_set_are_drawn(options):
    tests = ExtractionPrompts.read(ExtractionConfig(**options, num_test_prompts=2)).tests
    assert all(len(own) == 2 and set(own) < set(TESTS[kind]) for kind, own in tests.items())


def test_prompts_that_all_repeat_others_are_refused(options):
    with open(options["test_benign_data"], "w"):
        pass
    add(options["test_benign_data"], *BENIGN)
    with pytest.raises(CalibrationDataError, match="Every prompt of test_benign repeats one"):
        made(options)


def test_a_prompt_that_is_there_twice_is_asked_once(options):
    for name, prompts in (("harmful_data", HARMFUL), ("benign_data", BENIGN)):
        add(options[name], *prompts, *prompts)
    asked = ExtractionPrompts.read(ExtractionConfig(**options)).to_answer()
    assert [sorted(own) for own in asked] == [sorted(HARMFUL), sorted(BENIGN)]


@pytest.mark.parametrize("name", ["harmful_data", "benign_data", "test_benign_data"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused_with_its_file(text, name, options):
    add(options[name], text)
    with pytest.raises(CalibrationDataError, match=r"A prompt of .*\.jsonl is empty: remove"):
        made(options)


@pytest.mark.parametrize("missing", ["test_harmful_data", "test_benign_data"])
def test_one_kind_alone_is_refused(missing, options):
    del options[missing]
    with pytest.raises(ConfigError, match=f"and `{missing}` is not: set both, or neither"):
        made(options)


def test_a_kind_that_nothing_is_known_of_is_told(options, caplog):
    with open(options["test_benign_data"], "w"):
        pass
    add(options["test_benign_data"], "mumbled: a word")
    made(options)
    assert "any of the benign prompts to measure on (its answers: 1 incoherent)" in caplog.text


def test_harmful_prompts_of_which_the_aligned_model_refuses_none_are_told(options, caplog):
    made(options)
    assert "refuses none of the harmful" not in caplog.text
    with open(options["test_harmful_data"], "w"):
        pass
    add(options["test_harmful_data"], TESTS["harmful"][2])
    made(options | {"overwrite_output_dir": True})
    assert "refuses none of the harmful prompts to measure on" in caplog.text


def test_the_command_says_what_became_of_prompts_to_measure_on(options, capsys):
    add(options["test_harmful_data"], HARMFUL[0].upper() + "!")
    assert main(argv("extract", options)) == 0
    told = capsys.readouterr().out
    assert (
        "Harmful prompts to measure on: the aligned model refuses 2 and answers 1; 1 left out, because they nearly repeat others."
        in told
    )
    assert (
        "Benign prompts to measure on: the aligned model refuses 1 and answers 2; 1 left out for their answers."
        in told
    )
    del options["test_harmful_data"], options["test_benign_data"]
    assert main(argv("extract", options | {"overwrite_output_dir": True})) == 0
    assert "to measure on" not in capsys.readouterr().out


def test_border_prompts_are_stored_and_no_benign_answers(options, monkeypatch, capsys):
    """Benign prompts that the aligned model refuses: distillation is not anchored in refusals."""
    del options["test_harmful_data"], options["test_benign_data"]
    add(options["benign_data"], REFUSED)
    seen = []
    batches = pipeline.reference_batches

    def counting(model, samples, size, pad, anchor, sharding):
        seen.append((anchor, len(samples)))
        return batches(model, samples, size, pad, anchor, sharding)

    monkeypatch.setattr(pipeline, "reference_batches", counting)
    vector = made(options | {"method": "distill", "distill_steps": 2})
    assert seen == [(False, len(HARMFUL)), (True, len(BENIGN))]
    (border,) = [row for row in vector.prompts if row.get("verdict") == "refused"]
    assert border["prompt"] == REFUSED and border["kind"] == "benign"
    assert border["response"] == "I can't help with that."
    assert "test_prompts" not in vector.selection and vector.describe()["format_version"] == 3
    assert main(["inspect", options["output_dir"]]) == 0
    assert f"{len(BENIGN)} benign prompts with answers, 1 with refusals" in capsys.readouterr().out
    assert "1 benign prompts that the aligned model refuses" in str(vector.generate_model_card())


@pytest.mark.parametrize("kind", ["to answer", "to measure on"])
def test_few_prompts_are_of_every_category(kind, tmp_path):
    """However many more of one there are."""
    sources = {}
    for name in ("harmful", "benign", "test_harmful", "test_benign"):
        rows = [
            {
                "prompt": f"{sha256_of_json([name, subject, i])} of {subject}",  # none near another
                "category": subject,
            }
            for subject, count in (("arson", 90), ("fraud", 3), ("theft", 3))
            for i in range(count)
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[f"{name}_data"] = str(file)
    config = ExtractionConfig(**sources, num_safety_prompts=6, num_test_prompts=6)
    found = ExtractionPrompts.read(config)
    chosen = found.to_answer()[0] if kind == "to answer" else found.tests["harmful"]
    assert len(chosen) == 6
    for subject in ("arson", "fraud", "theft"):
        assert sum(text.endswith(subject) for text in chosen) == 2, chosen
