"""`safegene apply` on a model that is loaded: what it finds out before it loads it."""

import pytest

from safegene_trl import SafeGeneConfig
from safegene_trl.errors import CalibrationDataError, VectorError
from safegene_trl.step import apply_with_search
from safegene_trl.step.apply import apply


@pytest.fixture
def unloaded(monkeypatch):
    """No model is loaded in the test."""

    def loaded(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(apply_with_search, "load_placed", loaded)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("data", "task_data"),
        ("data", "safety_data"),
        ("gate", "harmful_data"),
        ("gate", "benign_data"),
    ],
)
def test_a_data_file_that_is_not_there_is_named_before_the_model_is_loaded(
    group, key, vector_dir, model_dir, task_file, tmp_path
):
    groups = {
        "data": {"task_data": str(task_file)},
        "output": {"output_dir": str(tmp_path / "out")},
    }
    groups.setdefault(group, {})[key] = str(tmp_path / "nowhere.jsonl")
    config = SafeGeneConfig(vector=str(vector_dir), **groups)
    with pytest.raises(CalibrationDataError, match=r"nowhere\.jsonl is not there: check its path"):
        apply(config, model_dir)


@pytest.mark.usefixtures("unloaded")
def test_a_vector_that_is_not_there_is_named_before_the_model_is_loaded(
    model_dir, task_file, tmp_path
):
    config = SafeGeneConfig(
        vector=str(tmp_path / "nowhere"),
        data={"task_data": str(task_file)},
        output={"output_dir": str(tmp_path / "out")},
    )
    with pytest.raises(VectorError, match="nowhere"):
        apply(config, model_dir)
