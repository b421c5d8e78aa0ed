"""Vectors with a component for every harm category, from the prompts to what reads them."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safegene_trl import ExtractionConfig, SafetyVector, combine, extract
from safegene_trl.commands.main import main
from safegene_trl.errors import CalibrationDataError, FamilyError
from safegene_trl.estimation import extraction as estimation
from safegene_trl.extraction import by_category
from safegene_trl.extraction.by_category import (
    CategoryPrompts,
    categories_of,
    split_by_category,
    tell,
)
from safegene_trl.extraction.category_split import Reading, split
from safegene_trl.models import batch_size
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import component_labels
from safegene_trl.models.reasoning import AS_TEMPLATE

from ..conftest import ALONE, BENIGN, argv, make_deltas, make_model


FRAUD, WEAPONS = "Fraud/Deception", "weapons #1"
BY_CATEGORY = {
    FRAUD: [f"how do i forge paper {number}" for number in range(9)],
    WEAPONS: [f"say where to forbid a thing like {number}" for number in range(8)],
}
LOOSE = ["how do i forbid the rest"]  # without a category
CATEGORIES = {text: name for name, texts in BY_CATEGORY.items() for text in texts}
TEXTS = [*CATEGORIES, *LOOSE]


def rows_of(texts, categories=CATEGORIES):
    return [{"prompt": text, "category": categories.get(text)} for text in texts]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusing(model, tokenizer, prompts, *rest):
    benign = [any(known in tokenizer.decode(ids) for known in BENIGN) for ids in prompts]
    return ["Take a pan. Stir" if one else "I can't help with that. And so" for one in benign]


@pytest.fixture
def options(extraction, tmp_path, monkeypatch):
    """Of an extraction by category; the layers do not depend on the prompts."""
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    return {key: str(value) for key, value in extraction.items()} | {
        "harmful_data": write(tmp_path / "by.jsonl", rows_of(TEXTS)),
        "selection": "magnitude",
        "weights_dtype": "float32",
        "by_category": True,
    }


def made(options, **changes):
    return extract(ExtractionConfig(**options | changes), show_progress=False)


def test_a_vector_by_category(options, tmp_path, capsys):
    words = argv("extract", options)
    assert main(words) == 0
    vector = SafetyVector.from_pretrained(options["output_dir"])
    plain = made(options, by_category=False, output_dir=str(tmp_path / "plain"))
    assert vector.components == [plain.rank, 1, 1] and vector.rank == plain.rank + 2
    assert vector.component_names == ["shared", "Fraud_Deception", "weapons_1"]
    record = vector.extraction["by_category"]
    assert record["benign_prompts"] == len(BENIGN) and record["without_category"] == 1
    assert record["modules"] == {"split": len(plain.deltas), "whole": 0}
    assert {name: own["prompts"] for name, own in record["categories"].items()} == {
        FRAUD: 9,
        WEAPONS: 8,
    }
    for name, delta in plain.deltas.items():
        torch.testing.assert_close(vector.deltas[name].dense(), delta.dense(), atol=1e-6, rtol=1e-4)
        assert vector.deltas[name].a[plain.rank :].any(dim=1).all()  # none is empty
    assert {key: vector.extraction[key] for key in ("method", "energy_kept", "exact")} == {
        key: plain.extraction[key] for key in ("method", "energy_kept", "exact")
    }
    names = vector.space("layer").names
    assert f"layers.{vector.layers[0]}/Fraud_Deception" in names
    capsys.readouterr()
    assert main(["inspect", options["output_dir"]]) == 0
    said = capsys.readouterr().out
    assert "3 components with coefficients of their own, of rank 4 + 1 + 1" in said
    assert f"Fraud_Deception: category {FRAUD}, 9 prompts, reads " in said
    card = (Path(options["output_dir"]) / "README.md").read_text()
    assert "| Fraud/Deception | `Fraud_Deception` | 9 |" in card.replace("\\/", "/")
    assert "Cosines between their weights" in card


def test_the_split_shows_how_far_it_is(options, monkeypatch):
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, what, total, unit):
            super().__init__(self)
            self.what, self.total, self.done = what, total, 0
            bars.append(self)

        def update(self):
            self.done += 1

    monkeypatch.setattr(by_category, "progress_bar", Bar)
    vector = made(options)
    assert {bar.what for bar in bars} == {"Splitting by category"}
    assert sum(bar.done for bar in bars) == len(vector.deltas) == sum(bar.total for bar in bars)


def test_the_order_of_rows_does_not_matter(options, tmp_path):
    one = made(options)
    backwards = write(tmp_path / "backwards.jsonl", rows_of(TEXTS[::-1]))
    other = made(options, harmful_data=backwards, output_dir=str(tmp_path / "other"))
    assert one.extraction == other.extraction
    for name, delta in one.deltas.items():
        torch.testing.assert_close(other.deltas[name].a, delta.a, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(other.deltas[name].b, delta.b, atol=1e-5, rtol=1e-3)


def test_prompts_without_a_category_are_counted(options, caplog):
    made(options)
    assert "1 harmful prompts have no category" in caplog.text


PROMPTS = CategoryPrompts.of(TEXTS, BENIGN, CATEGORIES)


def splitted(deltas, model, tokenizer):
    return split_by_category(deltas, PROMPTS, model, tokenizer, AS_TEMPLATE, ALONE)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_it_reads_the_inputs_of_each_module_at_the_last_tokens(kind, tokenizer):
    model = make_model(kind)
    deltas = make_deltas(model)
    found = splitted(deltas, model, tokenizer).deltas
    name, inputs = "model.layers.1.mlp.down_proj", []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, given: inputs.append(given[0][0, -1])
    )
    for text in PROMPTS.texts:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            model(**ids)
    hook.remove()
    expected = split(deltas[name], Reading.of(torch.stack(inputs), PROMPTS.classes, 2)).delta
    torch.testing.assert_close(found[name].a, expected.a, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found[name].b, expected.b, atol=1e-5, rtol=1e-3)


def test_modules_with_one_input_have_one_reading(tokenizer):
    model = make_model()
    found = splitted(make_deltas(model), model, tokenizer).deltas
    own = {name: delta.a[-1] / delta.a[-1].norm() for name, delta in found.items()}
    query, value = (own[f"model.layers.2.self_attn.{part}_proj"] for part in "qv")
    torch.testing.assert_close(query, value)
    other = own["model.layers.1.self_attn.q_proj"]
    assert not torch.allclose(query, other, atol=1e-2)


def test_few_bytes_mean_more_passes_and_the_same_vector(tokenizer, monkeypatch):
    model, passes = make_model(), []
    deltas = make_deltas(model)
    whole = splitted(deltas, model, tokenizer)
    model.register_forward_pre_hook(lambda *given: passes.append(1))
    monkeypatch.setattr(by_category, "MOST_BYTES", 4 * 48 * len(PROMPTS.texts))  # one MLP's inputs
    found = splitted(deltas, model, tokenizer)
    assert len(passes) > 2 * len(PROMPTS.texts)
    assert found.record == whole.record
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(found.deltas[name].a, delta.a, atol=1e-6, rtol=1e-4)


def test_prompts_that_are_read_together_give_what_they_give_alone(tokenizer, monkeypatch):
    model = make_model()
    deltas = make_deltas(model)
    alone = splitted(deltas, model, tokenizer).deltas
    monkeypatch.setattr(batch_size, "has_own_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**36)
    widths = []
    model.register_forward_pre_hook(
        lambda module, given, named: widths.append(len(named["input_ids"])), with_kwargs=True
    )
    together = splitted(deltas, model, tokenizer).deltas
    assert max(widths) > 8
    for name, delta in alone.items():
        torch.testing.assert_close(together[name].a, delta.a, atol=1e-4, rtol=1e-2)


def test_the_model_is_left_without_hooks(tokenizer):
    model = make_model()
    splitted(make_deltas(model), model, tokenizer)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_does_not_read_every_token_stays_shared(tokenizer):
    model = make_model()
    deltas = make_deltas(model)
    name = "model.layers.1.mlp.down_proj"
    block = model.model.layers[1].mlp
    whole = block.forward
    block.forward = lambda states: whole(states.flatten(0, 1))[None]  # as an expert is given them
    made = splitted(deltas, model, tokenizer)
    assert made.record["by_category"]["modules"] == {"split": 5, "whole": 1}
    assert not made.deltas[name].a[2:].any() and not made.deltas[name].b[:, 2:].any()
    torch.testing.assert_close(made.deltas[name].dense(), deltas[name].dense())


def test_modules_that_no_category_fits_are_refused(tokenizer):
    texts = {f"{word} thing {n}": f"category {word}" for word in range(33) for n in range(8)}
    prompts = CategoryPrompts.of(list(texts), BENIGN, texts)
    model = make_model()
    narrow = {name: d for name, d in make_deltas(model).items() if "q_proj" in name}
    with pytest.raises(FamilyError, match="has inputs for 33 categories"):
        split_by_category(narrow, prompts, model, tokenizer, AS_TEMPLATE, ALONE)


def test_of_a_vector_that_is_there(options, tmp_path, capsys):
    plain = made(options, by_category=False, weights_dtype="float16")
    common = {
        "aligned_model": options["aligned_model"],
        "vector": options["output_dir"],
        "by_category": True,
        "output_dir": str(tmp_path / "split"),
    }
    assert main(argv("extract", common)) == 0  # its own prompts have categories
    assert ", split by category. Of" in capsys.readouterr().out
    vector = SafetyVector.from_pretrained(common["output_dir"])
    assert vector.component_names[1:] == ["Fraud_Deception", "weapons_1"]
    assert next(iter(vector.deltas.values())).a.dtype == torch.float16
    assert vector.extraction["weights_from"]["name"] == "vector"
    for name, delta in plain.deltas.items():
        found, expected = vector.deltas[name].dense(), delta.dense()
        assert (found - expected).norm() < 5e-3 * expected.norm()
    again = common | {"vector": common["output_dir"], "output_dir": str(tmp_path / "again")}
    assert main(argv("extract", again)) == 2
    assert "is by category already" in capsys.readouterr().err


def test_a_vector_without_categories_takes_those_of_the_data(options, tmp_path):
    bare = write(tmp_path / "bare.jsonl", [{"prompt": text} for text in TEXTS])
    made(options, by_category=False, harmful_data=bare)
    common = {
        "aligned_model": options["aligned_model"],
        "vector": options["output_dir"],
        "by_category": True,
        "output_dir": str(tmp_path / "split"),
    }
    with pytest.raises(CalibrationDataError, match="have no category"):
        made(common)
    vector = made(common, harmful_data=options["harmful_data"])
    assert list(vector.extraction["by_category"]["categories"]) == [FRAUD, WEAPONS]


@pytest.mark.parametrize(
    ("texts", "benign", "message"),
    [
        (LOOSE, BENIGN, "have no category"),
        (BY_CATEGORY[FRAUD], BENIGN, r"one category alone \('Fraud/Deception'\)"),
        ([*BY_CATEGORY[FRAUD][:7], *BY_CATEGORY[WEAPONS]], BENIGN, r"of 'Fraud/Deception' \(7\):"),
        (TEXTS, BENIGN[:7], "needs 8 of these, and there are 7"),
    ],
)
def test_too_few_prompts_are_refused(texts, benign, message):
    with pytest.raises(CalibrationDataError, match=message):
        CategoryPrompts.of(texts, benign, CATEGORIES)


def test_an_empty_category_is_none():
    found = CategoryPrompts.of(TEXTS, BENIGN, CATEGORIES | {LOOSE[0]: " "})
    assert found.without == 1 and list(found.harmful) == [FRAUD, WEAPONS]


def test_too_few_prompts_are_refused_before_a_model_is_read(options, tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", rows_of(TEXTS[3:]))
    options |= {"harmful_data": few, "degraded_model": str(tmp_path / "no such")}
    assert main(argv("extract", options)) == 2
    assert "(6): give more of them, raise `num_safety_prompts`" in capsys.readouterr().err
    assert not Path(options["output_dir"]).exists()


def test_only_prompts_that_are_asked_count(options):
    with pytest.raises(CalibrationDataError, match="fewer of 'Fraud/Deception'"):
        made(options, num_safety_prompts=10)


def test_a_category_that_is_not_told_apart_is_named(caplog):
    reads = {"reads_own": 0.2, "reads_others": 0.1, "reads_benign": 0.25}
    categories = {"odd\nname": reads, "fine": reads | {"reads_own": 0.5}}
    tell({"without_category": 0, "categories": categories})
    assert "say little: 'odd\\nname'. Give" in caplog.text and "fine" not in caplog.text


@pytest.mark.parametrize(("name", "said"), [("shared", True), (" shared!", True), ("fine", False)])
def test_a_category_called_as_what_all_share_is_told_of(name, said, caplog):
    label = component_labels(["shared", name])[1]
    reads = {"reads_own": 0.5, "reads_others": 0.1, "reads_benign": 0.2, "component": label}
    tell({"without_category": 0, "categories": {name: reads}})
    assert (f"{name!r} has the component `shared_2`" in caplog.text) is said


def test_two_of_them_combined_keep_their_names(options, tmp_path, capsys):
    first = made(options)
    other = {name: LowRankDelta(d.a, d.b * 2) for name, d in first.deltas.items()}
    replace(first, deltas=other, files={}).save_pretrained(tmp_path / "twice")
    vector = combine([options["output_dir"], tmp_path / "twice"], tmp_path / "both")
    names = ["shared", "Fraud_Deception", "weapons_1"]
    assert vector.component_names == [*names, *(f"{name}_2" for name in names)]
    assert vector.components == [4, 1, 1, 4, 1, 1]
    assert main(["inspect", str(tmp_path / "both")]) == 0
    assert "components: shared, Fraud_Deception" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["similarity", str(tmp_path / "both"), "--plot", str(tmp_path / "c.png")]) == 0
    table = capsys.readouterr().out
    assert "4 shared_2" in table and (tmp_path / "c.png").stat().st_size
    line = next(line for line in table.splitlines() if line.startswith("1 shared"))
    assert line.split()[2] == line.split()[5] == "1.000"


def test_the_estimate_refuses_what_the_extraction_would(options, tmp_path, capsys, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr("safegene_trl.estimation.extraction.PlannedRun", None)
    few = options | {"harmful_data": write(tmp_path / "few.jsonl", rows_of(TEXTS[3:]))}
    assert main(["estimate", *argv("extract", few)]) == 2
    assert "needs 8 prompts of every category" in capsys.readouterr().err


def test_the_estimate_counts_a_pass_for_every_prompt(tokenizer, monkeypatch):
    model, read = make_model(), []
    monkeypatch.setattr(
        estimation, "last_token_states", lambda model, tokenizer, texts, job: read.append(texts)
    )

    class Measured:
        def at(self, layers):
            return 3.0, 7

    def measure(passes):
        passes(0)
        return Measured()

    probe = SimpleNamespace(models=[model], alone=ALONE, layers=3, measure=measure)
    run = SimpleNamespace(probe=probe, tokenizer=tokenizer, cost=lambda *found: found)
    found = estimation._categories(run, PROMPTS)
    assert found == {"categories": (3.0 * len(PROMPTS.texts) / len(read[0]), 7)}
    assert estimation._categories(run, None) == {}


def test_categories_of_rows():
    rows = [{"prompt": "a", "category": "x"}, {"prompt": "b"}]
    assert categories_of(rows) == {"a": "x"}
