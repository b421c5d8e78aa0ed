"""Every impossible setting is refused with a sentence that names it."""

import pytest

from safegene_trl import SafeGeneConfig, SafeGeneError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vector": ""}, "No safety vector"),
        ({"min_coefficient": -0.1}, "never negative"),
        ({"max_coefficient": -1.0}, "never negative"),
        ({"min_coefficient": 1.0, "max_coefficient": 0.5}, "must be smaller"),
        ({"min_coefficient": 0.5, "max_coefficient": 0.5}, "must be smaller"),
        ({"max_coefficient": float("nan")}, "finite number"),
        ({"initial_coefficient": 9.0}, "must lie between"),
        ({"granularity": "head"}, "use one of layer, module"),
        ({"output_format": "gguf"}, "use one of merged, adapter, both"),
        ({"on_failure": "ignore"}, "use one of raise, warn"),
        ({"num_safety_shots": 0}, "at least 1"),
        ({"num_safety_shots": 1}, "at least 2"),
        ({"num_task_shots": 2.5}, "whole number"),
        ({"batch_size": True}, "whole number"),
        ({"holdout_share": 1.0}, "strictly between"),
        ({"utility_weight": -1.0}, "at least 0"),
        ({"utility_temperature": 0.5}, "at least 1"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(SafeGeneError, match=message):
        SafeGeneConfig(**{"vector": "v", **values})


def test_unknown_key_names_the_nearest():
    with pytest.raises(SafeGeneError, match=r"`max_coeficient`.*did you mean `max_coefficient`"):
        SafeGeneConfig.from_dict({"vector": "v", "max_coeficient": 1.0})


@pytest.mark.parametrize(
    ("values", "start"), [({}, 0.3), ({"min_coefficient": 0.5}, 0.5), ({"max_coefficient": 0.1}, 0.1)]
)
def test_search_starts_inside_the_bounds(values, start):
    assert SafeGeneConfig(vector="v", **values).start == start


def test_dict_round_trip():
    config = SafeGeneConfig(vector="v", num_safety_shots=8, output_format="both")
    assert SafeGeneConfig.from_dict(config.to_dict()) == config
