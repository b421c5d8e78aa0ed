"""A planted direction is found again in a model of another architecture, width, depth and tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from safegene_trl import ExtractionConfig, SafeGeneError, SafetyVector, steering_directions
from safegene_trl.checkpoints.loading import load_tokenizer
from safegene_trl.commands.main import main
from safegene_trl.distributed.processes import this_job
from safegene_trl.extraction.transport import sides
from safegene_trl.extraction.transport.maps import Quality
from safegene_trl.extraction.transport.sides import Texts, read_source
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.provenance import model_reference
from safegene_trl.vectors.prompt_rows import rows_of
from safegene_trl.vectors.record import shares_of_one

from ...conftest import BENIGN, HARMFUL, argv, attached, refusing, write_prompts
from . import planted


NO = "I can't help with that."
ORIGINS = {
    "pair": {},
    "vector": {"source_degraded_model": None, "source_vector": "vector"},
    "states": {"source_degraded_model": None},
}


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def made(options, root=None, **changes):
    given = {
        key: root / value if key == "source_vector" else value
        for key, value in (options | changes).items()
        if value is not None
    }
    code = main(argv("extract", given))
    return code, given["output_dir"]


@pytest.mark.parametrize("transport_map", ["procrustes", "ridge", "mlp"])
@pytest.mark.parametrize("origin", ["pair", "vector"])
def test_a_planted_direction_is_found_again(pair, options, origin, transport_map):
    root, c = pair
    code, folder = made(options, root, transport_map=transport_map, **ORIGINS[origin])
    assert code == 0
    vector = SafetyVector.from_pretrained(folder)
    expected = c @ planted.frame(48, seed=6)
    found = steering_directions(vector)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(cosine(direction, expected) >= 0.95 for direction in found.values())


def test_the_direction_of_a_source_alone_is_the_target_s_own(pair, options):
    """Both models have the same in mind, so what tells harmful prompts in one does in the other."""
    code, folder = made(options, **ORIGINS["states"], layer_matching="cka")
    record = SafetyVector.from_pretrained(folder).extraction["transport"]
    assert code == 0 and all(layer["own_cosine"] >= 0.95 for layer in record["layers"])
    assert set(record["source"]) == {"model"}


def test_a_fine_tune_is_moved_by_one_direction_on_harmful_prompts_alone(pair, options):
    """With λ = 1 the modules of a layer move the residual stream by the direction together."""
    root, _ = pair
    _, folder = made(options, weights_dtype="float32")
    vector, model = SafetyVector.from_pretrained(folder), load(root / "target")
    direction = steering_directions(vector)[0]
    one = {name: delta for name, delta in vector.deltas.items() if ".layers.0." in name}
    tokenizer = load_tokenizer(str(root / "target"))
    moved = {}
    for kind, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        found = []
        for prompt in prompts:
            ids = tokens(tokenizer, prompt)
            with torch.no_grad():
                plain = model(ids, output_hidden_states=True).hidden_states[1][0, -1]
                with attached(model, one):
                    on = model(ids, output_hidden_states=True).hidden_states[1][0, -1]
            found.append(float((on - plain) @ direction / direction.norm() ** 2))
        moved[kind] = sum(found) / len(found)
    # eight benign prompts tell less of the MLP's inputs, which are random, than many would
    assert 0.8 < moved["harmful"] < 1.2 and abs(moved["benign"]) < 0.5


def tokens(tokenizer, prompt):
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("source", "degraded"), [(NO, "Sure, take a pan."), ("Sure, yes.", NO)])
def test_a_source_that_refuses_less_than_its_degraded_model_is_refused(
    options, capsys, monkeypatch, source, degraded
):
    """Swapped, the vector would be the right one times -1, and no coefficient turns it."""
    replies = iter([source, degraded])
    monkeypatch.setattr(
        sides,
        "answers_to_tokens",
        lambda model, tokenizer, prompts, *rest: [next(replies)] * len(prompts),
    )
    code, folder = made(options)
    assert (code == 0) == folder.exists() == (source == NO)
    if code:
        said = capsys.readouterr().err
        assert "of the harmful prompts that both were asked, and" in said
        assert "would take refusals away" in said


def test_where_nothing_is_planted_nothing_is_made(options, tmp_path, capsys):
    """Prompts of one kind under two names: the halves of a direction of chance do not agree."""
    words = planted.anchors(40, seed=5)
    for name, own in (("harmful_data", words[:20]), ("benign_data", words[20:])):
        write_prompts(options[name], own)
    code, folder = made(options, **ORIGINS["states"])
    assert code == 2 and not folder.exists()
    assert "shows no direction of its own on harmful prompts" in capsys.readouterr().err


def test_a_pair_that_does_not_differ_is_refused(pair, options, capsys):
    code, _ = made(options, source_degraded_model=options["source_model"])
    assert code == 2 and "a source that differs more from its degraded" in capsys.readouterr().err


def test_a_map_that_is_not_good_enough_is_refused(options, capsys, monkeypatch):
    """The states of a target whose anchors were mixed up have nothing to do with the source's."""
    whole = sides.read_target

    def mixed(config, reader, texts, folder):
        found = whole(config, reader, texts, folder)
        for layer in found.anchors:
            rows = layer.open("r+")
            rows[:] = rows[np.random.default_rng(0).permutation(layer.count)]
        return found

    monkeypatch.setattr("safegene_trl.extraction.transport.transport.read_target", mixed)
    code, folder = made(options, map_penalty=0.1)
    said = capsys.readouterr().err
    assert code == 2 and not folder.exists()
    assert "takes on a direction of" in said and "`min_transport_quality` is 0.3" in said


def test_layers_below_the_limit_are_left_out_by_name(options, caplog, monkeypatch):
    quality = iter([0.9, 0.2, 0.9, 0.9, 0.9])
    monkeypatch.setattr(
        "safegene_trl.extraction.transport.carry.held_out_quality",
        lambda *_: Quality(0.5, next(quality)),
    )
    code, folder = made(options)
    assert code == 0 and SafetyVector.from_pretrained(folder).layers == [0, 2, 3, 4]
    assert "take no direction on" in caplog.text and "of chance: 1." in caplog.text


@pytest.mark.parametrize(("bent", "said"), [([], False), ([0, 1], True)])
def test_layers_that_write_through_a_norm_are_named(options, caplog, monkeypatch, bent, said):
    monkeypatch.setattr(
        "safegene_trl.extraction.transport.sides.bent_layers", lambda model, ids: bent
    )
    made(options)
    assert ("In layers 0–1 of" in caplog.text and "scaled and bent there" in caplog.text) is said


def test_a_detector_that_tells_little_is_named(options, caplog):
    made(options)
    assert "hardly told from benign ones" in caplog.text
    assert "model.layers.1.self_attn.o_proj" in caplog.text


def test_the_record_says_where_it_is_from(pair, options, capsys, tmp_path):
    root, _ = pair
    code, folder = made(options, root, **ORIGINS["vector"])
    said = capsys.readouterr().out
    assert code == 0 and "fitted on 160 anchors and measured on 40 others" in said
    assert "the stored refusals are its own" in said
    vector = SafetyVector.from_pretrained(folder)
    assert vector.degraded_model == {"name": "none", "revision": None, "files": {}}
    record = vector.extraction["transport"]
    assert record["source"]["model"]["files"] == model_reference(str(root / "source"))["files"]
    own = SafetyVector.from_pretrained(root / "vector").files
    assert record["source"]["vector"]["files"] == {k: v["sha256"] for k, v in own.items()}
    card = (folder / "README.md").read_text()
    assert "carried over from another model (no degraded model was made)" in card
    assert "Carried over from source by `ridge`" in card and "aligned model's own refusals" in card
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "extracted by transport" in said and "carried over from source by ridge" in said
    assert "those of the model it was carried over from" not in said


def test_a_target_that_refuses_nothing_gets_the_source_s_refusals(options, capsys, monkeypatch):
    """And nothing is said of what the target would do with those prompts."""

    def only_llamas_refuse(model, tokenizer, prompts, *rest):
        if model.config.model_type == "llama":
            return refusing(model, tokenizer, prompts)
        return ["Take a pan. Stir"] * len(prompts)

    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", only_llamas_refuse)
    code, folder = made(options)
    assert code == 0 and "the stored refusals are the source's" in capsys.readouterr().out
    vector = SafetyVector.from_pretrained(folder)
    harmful = rows_of(vector.prompts, "harmful")
    assert len(harmful) == 12 and not any("targets" in row for row in harmful)
    assert len(rows_of(vector.prompts, "benign")) == 8
    assert vector.extraction["transport"]["refusals"] == {
        "from": "source",
        "asked": 12,
        "refused": 0,
        "refused_by_source": 12,
    }
    assert "another model's refusals" in (folder / "README.md").read_text()
    assert main(["inspect", str(folder)]) == 0
    assert "those of the model it was carried over from" in capsys.readouterr().out


def test_where_neither_refuses_nothing_is_made(options, capsys, monkeypatch):
    monkeypatch.setattr(
        "safegene_trl.extraction.answers.answers_to_tokens",
        lambda model, tokenizer, prompts, *rest: ["Take a pan. Stir"] * len(prompts),
    )
    code, folder = made(options)
    assert code == 2 and not folder.exists()
    assert "refuses harmful prompts, so there are no refusals" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aligned_model": "source"}, "are one family, so nothing has to be carried over"),
        ({"source_degraded_model": "target"}, "has other layers than"),
        (ORIGINS["vector"] | {"source_vector": "vector", "source_model": "target", "aligned_model": "source"}, "made for"),
        (ORIGINS["vector"] | {"source_vector": "vector", "source_model": "degraded"}, "has other weights than"),
    ],
)  # fmt: skip
def test_models_that_do_not_go_together(pair, options, changes, message, capsys):
    root, _ = pair
    named = {key: value and root / value for key, value in changes.items()}
    code = main(argv("extract", {k: v for k, v in (options | named).items() if v is not None}))
    assert code == 2 and message in capsys.readouterr().err


def test_what_is_done_to_a_vector_is_done_afterwards(options, capsys):
    for name, value in (("by_category", True), ("cover", "audit.json")):
        assert made(options, **{name: value})[0] == 2
        said = capsys.readouterr().err
        assert f"`{name}` is set and `method` is `transport`: make the vector first" in said


def test_anchors_that_repeat_a_harmful_prompt_are_refused(options, capsys):
    write_prompts(options["anchor_data"], [*planted.anchors(), HARMFUL[3] + "!"])
    code, _ = made(options)
    said = capsys.readouterr().err
    assert code == 2 and "1 of the anchors in" in said and HARMFUL[3] in said


def test_too_few_anchors_and_prompts(options, capsys):
    assert made(options, num_anchors=39)[0] == 2
    assert "gives 39 anchors" in capsys.readouterr().err
    assert made(options, num_safety_prompts=7)[0] == 2
    assert "`harmful_data` gives 7 prompts" in capsys.readouterr().err
    assert made(options, num_anchors=40, map_penalty=0)[0] == 2
    assert "42 anchors are needed" in capsys.readouterr().err


def test_few_anchors_are_told_with_the_number_needed(options, caplog):
    assert made(options, num_anchors=40)[0] == 0
    assert "fitted on 32 anchors and the source's states have 32 numbers" in caplog.text
    assert "42 anchors are needed" in caplog.text


def test_steering_directions_are_those_of_a_transport_alone(vector_dir):
    with pytest.raises(SafeGeneError, match="made by `delta` and holds no directions"):
        steering_directions(SafetyVector.from_pretrained(vector_dir))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers[0].update(length=-3.0), "damaged|not as|cannot be"),
        (lambda layers: layers.__delitem__(slice(1, None)), "tells of 1 layers"),
    ],
)
def test_a_record_that_was_changed_by_hand_steers_nothing(change, message, options):
    _, folder = made(options)
    path = Path(folder) / "safegene_config.json"
    config = json.loads(path.read_text())
    change(config["extraction"]["transport"]["layers"])
    path.write_text(json.dumps(config))
    with pytest.raises(SafeGeneError, match=message):
        steering_directions(SafetyVector.from_pretrained(folder))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", [1.0]),
        ("combined", [0.5, 0.5]),
        ("split", [1.0, 1.0]),
        ("split and combined", [0.5, 0.5, 0.5]),
        ("combined and split", [0.5, 0.5, 0.5]),
        ("combined twice", [1 / 3] * 3),
        ("combined twice and split", [1 / 3] * 2),
    ],
)
def test_a_vector_of_components_counts_as_one_difference(kind, expected):
    plain, split = {"rank": 2}, {"rank": 2, "components": [1, 1], "by_category": {}}
    twice = combination_of(combination_of(plain, plain), plain)
    made = {
        "plain": plain,
        "combined": combination_of(plain, plain),
        "split": split,
        "split and combined": combination_of(split, plain),
        "combined and split": combination_of(plain, plain)
        | {"components": [4, 1, 1], "by_category": {}},
        "combined twice": twice,
        "combined twice and split": twice | {"components": [5, 1], "by_category": {}},
    }
    assert shares_of_one(made[kind], 2) == expected


def combination_of(*parts):
    ranks = [rank for part in parts for rank in part.get("components", [part["rank"]])]
    return {
        "rank": sum(ranks),
        "components": ranks,
        "vectors": [{"extraction": part} for part in parts],
    }


def test_a_split_moves_its_source_as_the_vector_does(pair, options, tmp_path):
    root, _ = pair
    vector = SafetyVector.from_pretrained(root / "vector")
    deltas = {name: halves(delta) for name, delta in vector.deltas.items()}
    record = {"rank": 2, "components": [1, 1], "by_category": {}}
    split = replace(vector, deltas=deltas, extraction=vector.extraction | record)
    settings = {key: value for key, value in options.items() if key != "source_degraded_model"}
    config = ExtractionConfig(
        **{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    )
    texts = Texts(planted.anchors(4, seed=5), HARMFUL, BENIGN)
    found = []
    for name, one in (("whole", vector), ("split", split)):
        states = read_source(config, texts, one, tmp_path / name, this_job())
        found.append(states.looked_at(1)[0])
    np.testing.assert_allclose(*found, atol=1e-6)
    assert np.abs(found[0]).max() > 1e-3


def halves(delta):
    """The same matrix as the sum of two components."""
    return LowRankDelta(torch.cat([delta.a, delta.a]), torch.cat([delta.b, delta.b], dim=1) / 2)
