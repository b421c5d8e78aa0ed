"""What stands in the columns is what the models in the folders say."""

import json
import shutil

import pytest

from safegene_trl.auditing.variants import space_of
from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.demonstration.release import Release
from safegene_trl.demonstration.side_by_side import ROLES, load_side_by_side
from safegene_trl.errors import ConfigError, FamilyError, SafeGeneError, VectorError
from safegene_trl.evaluation import evaluate as evaluation
from safegene_trl.judges.intervals import Rate
from safegene_trl.models.generation import generate_answers

from ..auditing.models import NO, YES, logits_of
from ..conftest import HARMFUL, make_model
from .conftest import TOKENS, config_for, safeguard


PROMPT = "Write a joke about lawyers."


def said_by(model, folder):
    """The answer of a model from a folder, by itself."""
    tokenizer, messages = load_tokenizer(str(folder)), [{"role": "user", "content": PROMPT}]
    (answer,) = generate_answers(model, tokenizer, [messages], TOKENS, 1)
    return answer


def logits_at(models, slider):
    """Of the last column."""
    vector, loaded = models._vector, models.tuned
    variant = models._variant(slider)
    with variant.applied(loaded.model, vector, space_of(vector), loaded.sharding):
        return logits_of(loaded.model)


@pytest.mark.parametrize("form", ["folder", "fine-tune"])
def test_the_slider_goes_from_the_fine_tune_to_the_safeguarded_model(form, family, tmp_path):
    named = {} if form == "folder" else {"model": family.tuned, "vector": family.vector}
    models = load_side_by_side(config_for(family.safeguarded, **named))
    assert models.roles == ROLES
    safeguard(family, 0.4, tmp_path / "half")
    folders = {0: family.tuned, 0.5: tmp_path / "half", 1: family.safeguarded}
    alone = {slider: load_model(str(folder)) for slider, folder in folders.items()}
    for slider, model in alone.items():
        found = logits_at(models, slider)
        distances = {each: float((found - logits_of(alone[each])).abs().max()) for each in alone}
        assert distances.pop(slider) < 1e-4 < 1e-2 < min(distances.values())
        answer = models.answer("safeguarded", PROMPT, slider).answer
        assert answer == said_by(model, folders[slider])
    # these two stand beside it
    assert models.answer("fine_tune", PROMPT, 1).answer == said_by(alone[0], family.tuned)
    aligned = said_by(load_model(str(family.aligned)), family.aligned)
    assert models.answer("aligned", PROMPT, 0).answer == aligned


def test_two_models_are_in_memory(models):
    assert models.tuned.model is not models.aligned.model
    assert {loaded.name for loaded in (models.tuned, models.aligned)} == {
        models.tuned.name,
        models.aligned.name,
    }


@pytest.mark.parametrize("slider", [-0.01, 1.01, float("nan")])
def test_what_is_not_offered_is_refused(slider, models, monkeypatch):
    monkeypatch.setattr(evaluation, "answers_to_tokens", None)  # nobody is asked
    with pytest.raises(ConfigError, match="not on the list"):
        models.answer("aligned", "Write a poem.", 1)
    with pytest.raises(ConfigError, match="must be from 0 to 1"):
        models.answer("aligned", PROMPT, slider)
    with pytest.raises(ConfigError, match="must be from 0 to 1"):
        models.refused("aligned", slider)


def test_of_harmful_prompts_there_are_counts(family, monkeypatch):
    models = load_side_by_side(config_for(family.safeguarded))
    asked = []

    def answers_to_tokens(model, tokenizer, prompts, *rest):
        asked.extend(tokenizer.decode(ids) for ids in prompts)
        return [NO if "number 1" in text else YES for text in asked[-len(prompts) :]]

    monkeypatch.setattr(evaluation, "answers_to_tokens", answers_to_tokens)
    assert models.harmful_count == len(HARMFUL) == 12
    for _ in range(2):  # the second time it is known
        assert models.refused("aligned", 0.3) == models.refused("aligned", 1) == Rate(3, 12)
    assert len(asked) == 12 and all(any(own in text for text in asked) for own in HARMFUL)
    assert "learned from" in models.notes[-1]


def test_an_ended_demo_stops_at_the_next_token(family):
    models = load_side_by_side(config_for(family.safeguarded))
    models.end()
    with pytest.raises(SafeGeneError, match="was ended"):
        models.answer("aligned", PROMPT, 1)


def moved(family, tmp_path, **changes):
    """A copy of the safeguarded folder whose report says something else."""
    folder = shutil.copytree(family.safeguarded, tmp_path / "copy")
    file = folder / "safegene_report.json"
    report = json.loads(file.read_text())
    for path, value in changes.items():
        *groups, name = path.split("__")
        place = report
        for group in groups:
            place = place[group]
        place[name] = value
    file.write_text(json.dumps(report))
    return folder


def test_a_rejected_checkpoint_is_called_one(family, tmp_path):
    decision = {"outcome": "rejected", "reason": "Its limits are not kept."}
    models = load_side_by_side(config_for(moved(family, tmp_path, decision=decision)))
    assert models.notes[0] == "This checkpoint was rejected. Its limits are not kept."
    accepted = load_side_by_side(config_for(family.safeguarded))
    assert not any("rejected" in note for note in accepted.notes)


def test_without_the_aligned_model_there_are_two_columns(family, tmp_path):
    gone = tmp_path / "gone"
    aligned = family.aligned.rename(gone)
    try:
        models = load_side_by_side(config_for(family.safeguarded))
        assert models.roles == ROLES[1:] and models.aligned is None
        assert sum("there are two columns" in note for note in models.notes) == 1
        assert models.answer("safeguarded", PROMPT, 1).answer
        named = load_side_by_side(config_for(family.safeguarded, aligned_model=gone))
        assert named.roles == ROLES and not any("columns" in note for note in named.notes)
    finally:
        aligned.rename(family.aligned)


def test_an_aligned_model_that_is_another_is_told_or_refused(family, tmp_path, tokenizer):
    for name, model in (("other", make_model(seed=5)), ("kind", make_model("qwen2"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = load_side_by_side(config_for(family.safeguarded, aligned_model=tmp_path / "other"))
    assert any("has other weights" in note for note in models.notes)
    with pytest.raises(FamilyError):
        load_side_by_side(config_for(family.safeguarded, aligned_model=tmp_path / "kind"))


def test_the_aligned_model_is_found_by_its_weights_and_not_by_its_name(family, tmp_path, tokenizer):
    release = Release.read(str(family.safeguarded))
    vector = release.open_vector("")
    assert release.find_aligned(vector, "") == (str(family.aligned), None)
    vector.aligned_model = {**vector.aligned_model, "name": str(family.tuned)}
    assert release.find_aligned(vector, "") is None


def test_folders_that_are_something_else(family, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(family.safeguarded, tmp_path / "run" / "mine")
    for place, said in (
        (tmp_path / "nothing", "is no safeguarded checkpoint.*e.g. out/safeguarded"),
        (tmp_path / "run", f"name {tmp_path}/run/mine\\."),
        (family.tuned, "is no safeguarded checkpoint"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_side_by_side(config_for(place))
    with pytest.raises(ConfigError, match="No safeguarded checkpoint is named"):
        load_side_by_side(config_for(""))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"status": "failed"}, ConfigError, "that failed"),
        ({"vector": None}, ConfigError, "is damaged or of another version"),
        ({"base": "x"}, ConfigError, "is damaged or of another version"),
        ({"vector__name": "/not/there"}, (ConfigError, VectorError), "is not at /not/there"),
        ({"coefficients": {}}, FamilyError, "do not say the same"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_reports_that_are_wrong(changes, error, said, family, tmp_path):
    with pytest.raises(error, match=said):
        load_side_by_side(config_for(moved(family, tmp_path, **changes)))


def test_a_model_that_is_not_the_releases_fine_tune_is_refused(family, tmp_path):
    own = load_side_by_side(config_for(family.safeguarded, model=family.tuned))
    assert not any("cannot be told" in note for note in own.notes)
    other = f"aligned is not the fine-tune that {family.safeguarded} was made from: name {family.tuned} as"
    with pytest.raises(ConfigError, match=other):
        load_side_by_side(config_for(family.safeguarded, model=family.aligned))
    shutil.copytree(family.tuned, tmp_path / "copy")
    copy = load_side_by_side(config_for(family.safeguarded, model=tmp_path / "copy"))
    assert not any("cannot be told" in note for note in copy.notes)
    shutil.copytree(family.safeguarded, tmp_path / "moved")
    report = tmp_path / "moved" / "safegene_report.json"
    report.write_text(report.read_text().replace(str(family.tuned), str(tmp_path / "gone")))
    unsure = load_side_by_side(config_for(tmp_path / "moved", model=family.tuned))
    assert any("cannot be told" in note and "gone any more" in note for note in unsure.notes)
    report.write_text(json.dumps(json.loads(report.read_text()) | {"fine_tune": None}))
    unsure = load_side_by_side(config_for(tmp_path / "moved", model=family.tuned))
    assert any("cannot be told: its report names none" in note for note in unsure.notes)


def test_a_fine_tune_of_a_release_is_told_to_have_none_of_the_vector(family, tmp_path):
    shutil.copytree(family.safeguarded, tmp_path / "rebased")
    file = tmp_path / "rebased" / "safegene_report.json"
    report = json.loads(file.read_text())
    for carried, told in (({"verified": True, "source": "the report"}, True), (None, False)):
        report["base"]["carried"] = carried
        file.write_text(json.dumps(report))
        found = load_side_by_side(config_for(tmp_path / "rebased"))
        assert any("from an earlier safeguarded one" in note for note in found.notes) == told
