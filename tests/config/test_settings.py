"""Every impossible setting is refused with a sentence that names it."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from safegene_trl import ConfigError, SafeGeneConfig, SafeGeneError
from safegene_trl.auditing.config import AuditConfig
from safegene_trl.commands.apply_arguments import ApplyArguments
from safegene_trl.config.data import DataConfig
from safegene_trl.config.docstrings import meanings
from safegene_trl.config.flat_keys import merged
from safegene_trl.config.gate import GateConfig
from safegene_trl.config.measure import MeasureConfig
from safegene_trl.config.output import OutputConfig
from safegene_trl.config.search import SearchConfig
from safegene_trl.config.settings import BLOCKS
from safegene_trl.config.validation import hint_of, names_of, nearest
from safegene_trl.evaluation.config import EvaluationConfig
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.extraction.transport.maps import MAPS
from safegene_trl.extraction.transport.matching import MATCHINGS
from safegene_trl.extraction.transport.states import POOLINGS

from ..conftest import config_of, in_groups


EXTRACTION = dict.fromkeys(
    ("aligned_model", "degraded_model", "output_dir", "harmful_data", "benign_data"), "x"
)
EVALUATION = {"model_name_or_path": "m", "harmful_data": ["d"]}


def extraction(**values):
    return ExtractionConfig(**{**EXTRACTION, **values}).check()


def evaluation(**values):
    return EvaluationConfig(**{**EVALUATION, **values}).check()


def safegene(**values):
    return SafeGeneConfig(**{"vector": "v", **values})


MAKERS = {
    SafeGeneConfig: safegene,
    DataConfig: DataConfig,
    SearchConfig: SearchConfig,
    MeasureConfig: MeasureConfig,
    OutputConfig: OutputConfig,
    GateConfig: GateConfig,
    ExtractionConfig: extraction,
    EvaluationConfig: evaluation,
    ApplyArguments: ApplyArguments,
}
# strings that may be numbers, and the one mapping
POSSIBLE = {
    ("chat_template_kwargs", dict),
    ("coefficients", int),
    ("coefficients", float),
    ("max_shard_size", int),
}
KEYS = [(kind, each.name) for kind in MAKERS for each in fields(kind)]


def wrong_values(hint):
    """Values that no field of this hint may have, whatever its range."""
    text = str(hint)
    yield from ({}, object(), "\0", "", " ", [""], [1])
    if "str" not in text:
        yield from (float("nan"), float("inf"), -float("inf"))
    if "bool" not in text:
        yield True
    if "str" not in text and "Literal" not in text:
        yield from ("false", "no", "0", "8", "0.5", "null", "1e-4")
    if "list" not in text:
        yield from (["x"], [])
    if "list" in text or "Literal" in text:
        yield "x"
    if hint in (int, int | None):
        yield from (0.5, 2**40, -(2**40))
    if "int" not in text and "float" not in text:
        yield from (1, 0, 2.5)
    if "None" not in text:
        yield None


@pytest.mark.parametrize(
    ("kind", "name"), KEYS, ids=[f"{kind.__name__}-{name}" for kind, name in KEYS]
)
def test_no_key_takes_a_value_of_the_wrong_type(kind, name):
    hint, default = hint_of(kind, name), kind.__dataclass_fields__[name].default
    for value in wrong_values(hint):
        if value == default == "" or (name, type(value)) in POSSIBLE:
            continue
        with pytest.raises(
            SafeGeneError, match=f"`(\\w+\\.)?{name}`|No .* is named|nothing to evaluate"
        ) as caught:
            MAKERS[kind](**{name: value})
        assert str(caught.value).endswith((".", "`")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"), KEYS, ids=[f"{kind.__name__}-{name}" for kind, name in KEYS]
)
def test_every_default_is_possible(kind, name):
    default = kind.__dataclass_fields__[name].default
    # a group's own defaults are those of its class
    if isinstance(default, str | int | float | None):
        MAKERS[kind](**({} if default == "" else {name: default}))


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
        ({"num_safety_shots": 0}, "at least 2 are needed"),
        ({"num_safety_shots": 2**40}, "at most 2147483647"),
        ({"num_safety_shots": 1}, "at least 2"),
        ({"num_task_shots": 2.5}, "whole number"),
        ({"batch_size": True}, "whole number"),
        ({"holdout_share": 1.0}, "strictly between"),
        ({"utility_weight": -1.0}, "at least 0"),
        ({"utility_temperature": 0.5}, "at least 1"),
        ({"max_coefficient": 1e308}, "at most 100"),
        ({"public_key": ""}, "`public_key` is empty"),
        ({"dry_run": "false"}, "without quotes"),
        ({"require_signature": "no"}, "without quotes"),
        ({"batch_size": "8"}, "whole number, without quotes"),
        ({"safety_data": ["a.jsonl"]}, "one string, not a list"),
        ({"vector_revision": 7}, "a string: put it in quotes"),
        ({"max_shard_size": "5 Gigs"}, "a size like `5GB`"),
        ({"max_shard_size": "5.5"}, "a size like `5GB`"),
        ({"max_shard_size": "0GB"}, "a size like `5GB`"),
        ({"max_shard_size": "-5GB"}, "a size like `5GB`"),
        ({"max_shard_size": 0}, "`output.max_shard_size` is '0'.*a size like `5GB`"),
        ({"max_shard_size": 10**400}, "a size like `5GB`"),
        ({"hub_model_id": "a/b/c"}, "`output.hub_model_id`.*like `owner/name`"),
        ({"hub_model_id": "two words"}, "like `owner/name`"),
        ({"output_dir": "."}, "a folder of its own"),
        ({"output_dir": "out/.."}, "a folder of its own"),
        ({"output_dir": "/"}, "a folder of its own"),
        ({"output_dir": "a\0b"}, "without NUL"),
        ({"seed": -1}, "at least 0"),
        ({"gate": {}}, "`gate` is empty"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "names that the chat template knows"),
        ({"chat_template_kwargs": {"enable_thinking": [1]}}, "names that the chat template knows"),
        *(
            ({"chat_template_kwargs": impossible}, "names that the chat template knows")
            for impossible in (
                {"self": 1},
                {"namespace": 1},
                {"class": 1},
                {"a": float("nan")},
                {"a": 10**400},
                {"a": "\ud800"},
            )
        ),
        ({"chat_template_kwargs": {"a b": True}}, "`data.chat_template_kwargs`.*as in"),
        ({"safety_target": "thinking"}, "use one of answer, reasoning"),
        ({"max_reasoning_tokens": -1}, "`measure.max_reasoning_tokens`.*at least 0"),
        ({"gate": {"min_refusal_rate": "0.8"}}, "`gate.min_refusal_rate`.*without quotes"),
        ({"gate": {"write_rejected": "no"}}, "`gate.write_rejected`.*without quotes"),
        ({"gate": {"harmful_data": ""}}, "`gate.harmful_data` is empty"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(SafeGeneError, match=message):
        config_of(**{"vector": "v", **values})


def test_unknown_key_names_the_nearest():
    with pytest.raises(
        SafeGeneError, match=r"`max_coeficient`.*did you mean `search.max_coefficient`"
    ):
        SafeGeneConfig.from_dict({"vector": "v", "max_coeficient": 1.0})
    with pytest.raises(
        SafeGeneError, match=r"`min_refusal_rat`.*did you mean `gate.min_refusal_rate`"
    ):
        SafeGeneConfig.from_dict({"vector": "v", "min_refusal_rat": 1.0})
    with pytest.raises(
        SafeGeneError, match=r"`max_lenght` in the search block; did you mean `data.max_length`"
    ):
        SafeGeneConfig.from_dict({"vector": "v", "search": {"max_lenght": 1}})


@pytest.mark.parametrize("group", [None, "search"])
def test_a_key_with_a_dot_says_where_it_stands(group):
    written = {"search.max_evaluations": 3}
    with pytest.raises(
        SafeGeneError, match="write the key `max_evaluations` in the block `search`"
    ) as caught:
        SafeGeneConfig.from_dict({"vector": "v"} | ({group: written} if group else written))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong", "nearest"),
    [
        (SafeGeneConfig, "vectr", "vector"),
        (GateConfig, "min_refusals", "min_refusal_rate"),
        (ExtractionConfig, "output", "output_dir"),
        (EvaluationConfig, "num_prompt", "num_prompts"),
    ],
)
def test_a_misspelt_argument_names_the_nearest(kind, wrong, nearest):
    with pytest.raises(
        SafeGeneError, match=f"`{wrong}` in {kind.__name__}; did you mean `{nearest}`"
    ):
        kind(**{wrong: "x"})


@pytest.mark.parametrize(
    ("values", "start"),
    [({}, 0.3), ({"min_coefficient": 0.5}, 0.5), ({"max_coefficient": 0.1}, 0.1)],
)
def test_search_starts_inside_the_bounds(values, start):
    assert SearchConfig(**values).start == start


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ("5GB", "5GB"),
        ("1.5 gb", "1.5 gb"),
        (5_000_000_000, "5000000.0KB"),
        ("5000000000", "5000000.0KB"),
    ],
)
def test_sizes_that_are_understood(size, kept):
    from huggingface_hub.serialization._base import parse_size_to_int

    assert OutputConfig(max_shard_size=size).max_shard_size == kept
    assert parse_size_to_int(kept) == (1_500_000_000 if size == "1.5 gb" else 5_000_000_000)


@pytest.mark.parametrize(
    "values",
    [
        {name: None}
        for name in (
            "vector",
            "vector_revision",
            "public_key",
            "require_signature",
            "gate",
            "search",
            "seed",
        )
    ]
    + [{"data": {"safety_data": None}}, {"output": {"history": None}}]
    + [
        {"gate": {"min_refusal_rate": 0.8, name: None}}
        for name in ("max_over_refusal", "harmful_data", "write_rejected")
    ],
)
def test_a_key_that_was_written_without_a_value_is_refused(values):
    with pytest.raises(SafeGeneError, match=r"has no value"):
        SafeGeneConfig.from_dict({"vector": "v", **values})


def test_where_nothing_depends_on_it_a_key_may_be_without_a_value():
    values = in_groups(
        dict.fromkeys(("initial_coefficient", "warm_start", "output_dir", "hub_model_id"))
    )
    assert SafeGeneConfig.from_dict({"vector": "v", **values}) == SafeGeneConfig(vector="v")


def test_a_report_brings_its_config_back():
    config = SafeGeneConfig(
        vector="v",
        data=DataConfig(num_safety_shots=8),
        output={"output_format": "both"},
        gate=GateConfig(min_refusal_rate=0.5),
    )
    assert SafeGeneConfig(**config.to_dict()) == config
    # as reports had it before there were groups
    found = config.to_dict()
    groups = [found.pop(name) for name in ("data", "search", "measure", "output")]
    flat = found | {key: value for group in groups for key, value in group.items()}
    assert len(flat) == 48 and SafeGeneConfig(**json.loads(json.dumps(flat))) == config


FLAT = {"vector": "v", "max_evaluations": 3, "history": "h.jsonl", "seed": 4}


@pytest.mark.parametrize(
    "make", [SafeGeneConfig.from_dict, lambda values: SafeGeneConfig(**values)]
)
def test_flat_keys_work_with_one_warning_that_names_their_places(make, caplog):
    config = make(FLAT)
    assert (config.search.max_evaluations, config.output.history, config.seed) == (3, "h.jsonl", 4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "`max_evaluations` is now `search.max_evaluations`, `history` is now `output.history`."
        in said
    )
    caplog.clear()
    beside = make(FLAT | {"search": {"benign_weight": 0.5}})
    assert (beside.search.benign_weight, beside.search.max_evaluations) == (0.5, 3)
    caplog.clear()
    make({"vector": "v", "search": {"max_evaluations": 3}, "gate": {"min_refusal_rate": 0.5}})
    assert not caplog.records


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"max_evaluations": 3}, "`max_evaluations` and `search.max_evaluations` are one setting"),
        (SearchConfig(), "`max_evaluations` stands beside `search`"),
        ({}, None),
    ],
)
def test_a_key_given_both_ways_is_refused(group, message):
    if message is None:
        assert SafeGeneConfig(vector="v", search=group, max_evaluations=3).search == SearchConfig(
            max_evaluations=3
        )
        return
    with pytest.raises(SafeGeneError, match=message):
        SafeGeneConfig(vector="v", search=group, max_evaluations=3)


@pytest.mark.parametrize("kind", [SafeGeneConfig, *BLOCKS.values()])
def test_every_setting_says_what_it_means(kind):
    assert all(meanings(kind).values()) and list(meanings(kind)) == names_of(kind)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "use one of delta, distill, linearized"),
        ({"layer_share": 0.0}, "above 0"),
        ({"layer_share": 1.5}, "at most 1"),
        ({"rank": 0}, "at least 1"),
        ({"isolate_from": "one-model"}, "a list of strings"),
        ({"dtype": "fp32"}, "use one of auto, float32"),
        ({"weights_dtype": "auto"}, "use one of float32"),
        ({"output_dir": "."}, "a folder of its own"),
        ({"degraded_model": ""}, "`degraded_model` is not set"),
        ({"source_model": "s"}, "`source_model` is set and `method` is `delta`"),
        ({"transport_map": "linear"}, "use one of procrustes, ridge, mlp"),
        ({"layer_matching": "none"}, "use one of depth, cka"),
        ({"min_transport_quality": 1.5}, "at most 1"),
    ],
)
def test_impossible_extractions(values, message):
    with pytest.raises(SafeGeneError, match=message):
        extraction(**values)


TRANSPORT = {"method": "transport", "degraded_model": "", "source_model": "s", "anchor_data": "a"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"degraded_model": "x"}, "`degraded_model` is set and `method` is `transport`"),
        ({"rank": 4}, "`rank` is set and `method` is `transport`"),
        ({"isolate_from": ["x"]}, "`isolate_from` is set and `method` is `transport`"),
        ({"source_model": ""}, "`source_model` is not set: give the aligned model that"),
        ({"selection": "gradient"}, "a transport has none: use `activation_contrast`"),
        ({"source_vector": "v", "source_degraded_model": "d"}, "are both set: leave out one"),
        ({"source_vector_revision": "r"}, "`source_vector` is not: set both"),
        ({"source_degraded_revision": "r"}, "`source_degraded_model` is not: set both"),
        ({"vector": "v"}, "`method` is set and so is `vector`"),
        ({"allow_other_base": True}, "`allow_other_base` is set and `vector` is not"),
    ],
)
def test_impossible_transports(values, message):
    extraction(**TRANSPORT)
    with pytest.raises(SafeGeneError, match=message):
        extraction(**TRANSPORT | values)


@pytest.mark.parametrize("kind", [AuditConfig, EvaluationConfig, ExtractionConfig, SafeGeneConfig])
def test_paths_and_tuples_are_taken_as_what_a_file_would_have(kind):
    """In every config alike."""
    place = {"output_dir": Path("out")}
    made = {
        AuditConfig: lambda: AuditConfig(
            vector=Path("v"), harmful_data=(Path("h.jsonl"),), forms=("direct",), **place
        ),
        EvaluationConfig: lambda: EvaluationConfig(
            Path("v"), harmful_data=[Path("h.jsonl")], judges=("refusal_phrases",), **place
        ),
        ExtractionConfig: lambda: ExtractionConfig(**EXTRACTION | place, isolate_from=(Path("v"),)),
        SafeGeneConfig: lambda: SafeGeneConfig(vector=Path("v"), output=place),
    }[kind]()
    made.check()
    assert getattr(made, "harmful_data", None) in (None, ["h.jsonl"], "x")
    assert (getattr(made, "output", None) or made).output_dir == "out"
    for each in fields(made):
        assert not isinstance(getattr(made, each.name), Path | tuple)


@pytest.mark.parametrize("text", ["x/" * 2048, "x" * 256])
def test_a_setting_that_is_too_long_for_a_path_is_refused(text):
    with pytest.raises(ConfigError, match="`vector` is too long"):
        SafeGeneConfig(vector=text)
    with pytest.raises(ConfigError, match="`harmful_data` is too long"):
        evaluation(harmful_data=[text])


def test_the_choices_of_a_transport_are_those_of_its_tables():
    tables = {"transport_map": MAPS, "layer_matching": MATCHINGS, "state_pooling": POOLINGS}
    for name, table in tables.items():
        field = ExtractionConfig.__dataclass_fields__[name]
        assert sorted(field.metadata["choices"]) == sorted(table)


def test_what_is_set_after_a_config_was_made_is_not_lost():
    """A flat key or a misspelt one would be set and never read."""
    config = SafeGeneConfig(vector="v")
    with pytest.raises(ConfigError, match=r"did you mean `output\.output_dir`"):
        config.output_dir = "elsewhere"
    with pytest.raises(ConfigError, match="did you mean `max_evaluations`"):
        config.search.max_evaluation = 3
    config.search.max_evaluations = -3
    with pytest.raises(ConfigError, match=r"search\.max_evaluations"):
        config.check()
    config.search = {"max_evaluations": 3}
    config.check()
    assert config.search.max_evaluations == 3


def test_a_block_that_is_none_is_not_replaced_without_a_word():
    for broken in (0.9, None):
        with pytest.raises(ConfigError, match="`gate` must be a block of keys and values"):
            merged({"gate": broken}, {"gate": {"min_refusal_rate": 0.5}})


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("model", ["base_model", "model_name_or_path", "model_revision"], "model_name_or_path"),
        ("mo", ["dim", "model_name_or_path"], None),
        ("plt", ["plot", "seal"], "plot"),
        ("sea", ["ease", "sealed", "seal"], "sealed"),
        ("x", ["plot"], None),
    ],
)
def test_a_name_that_begins_with_the_word_is_meant_before_one_like_it(word, known, found):
    said = nearest(word, known)
    assert said == (f"; did you mean `{found}`?" if found else ".")


def test_the_data_type_of_a_merge_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="adapter` writes none: leave one of them out"):
        OutputConfig(dtype="bfloat16", output_format="adapter")
    with pytest.raises(ConfigError, match=r"`output.dtype` is 'float8'"):
        OutputConfig(dtype="float8")
