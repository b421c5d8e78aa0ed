"""From an aligned reasoning model to a safeguarded fine-tune of it, with tiny models."""

import pytest
from datasets import Dataset
from jsonschema import validate
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.errors import ConfigError, RejectedError
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.extraction.extract import extract
from safegene_trl.reporting.report import SCHEMA

from .conftest import config_of, make_model, refusing, with_lora
from .reasoning_templates import reasoning_tokenizer


OFF = {"enable_thinking": False}


@pytest.fixture
def family(tmp_path, prompt_files, monkeypatch):
    """A vector of a family with a template of some kind: gives the vector, and what a fine-tune
    needs.
    """

    def make(kind, **options):
        tokenizer, folder = reasoning_tokenizer(kind), tmp_path / "aligned"
        model = make_model(vocab_size=len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        degraded = with_lora(make_model(vocab_size=len(tokenizer)))
        degraded.peft_config["default"].base_model_name_or_path = str(folder)
        degraded.save_pretrained(tmp_path / "degraded")

        def answers(model, tokenizer, prompts, *rest):
            said = refusing(model, tokenizer, prompts)
            thought = "" if kind == "hybrid" else "They ask.\n</think>\n\n"
            return [thought + text for text in said]

        monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", answers)
        vector = extract(
            ExtractionConfig(
                aligned_model=str(folder),
                degraded_model=str(tmp_path / "degraded"),
                output_dir=str(tmp_path / "vector"),
                harmful_data=str(prompt_files[0]),
                benign_data=str(prompt_files[1]),
                **options,
            )
        )
        return vector, make_model(vocab_size=len(tokenizer)), tokenizer

    return make


def fine_tune(tmp_path, model, tokenizer, column=None, **values):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"sort item {i}"}],
            "completion": [
                {"role": "assistant", "content": f"<think>\nit fits\n</think>\n\nbox {i % 3}"}
            ],
        }
        | ({} if column is None else {"chat_template_kwargs": column})
        for i in range(24)
    ]
    settings = {"num_safety_shots": 4, "num_benign_shots": 4, "num_task_shots": 4}
    settings |= {"num_test_prompts": 4, "max_evaluations": 2, "max_utility_loss": 100.0}
    callback = SafeGeneCallback(
        config_of(
            **{"vector": str(tmp_path / "vector"), "utility_weight": 0.0, **settings, **values}
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    callback.attach(trainer)
    return trainer, callback


def test_a_model_that_can_think_or_not_is_safeguarded_at_its_answers(family, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )
    vector, model, tokenizer = family("hybrid", chat_template_kwargs='{"enable_thinking": false}')
    assert vector.extraction["chat_template_kwargs"] == OFF
    assert vector.extraction["safety_target"] == "answer"
    assert {row["response"] for row in vector.prompts} == {
        "I can't help with that.",
        "Take a pan.",
    }
    trainer, callback = fine_tune(tmp_path, model, tokenizer, max_new_tokens=4)
    trainer.train()
    report = callback.report
    validate(report, SCHEMA)
    assert report["status"] == "safeguarded"
    assert report["data"]["chat_template_kwargs"] == OFF  # the vector's
    assert report["data"]["safety_target"] == "answer"
    measured = report["measured"]
    assert measured["chat_template_kwargs"] == OFF and measured["max_reasoning_tokens"] == 0
    for side in ("before", "after"):
        assert {"refusal_rate", "unfinished"} <= set(measured[side])
        assert measured[side]["unfinished"]["count"] == 8


def test_a_gate_lets_no_model_pass_that_only_thinks(family, tmp_path):
    vector, model, tokenizer = family(
        "thinking", safety_target="reasoning", max_reasoning_tokens=64
    )
    assert vector.prompts[0]["response"].startswith("<think>\nThey ask.\n</think>\n\n")
    # over-refusal alone would be kept: who gives no answer refuses none
    trainer, callback = fine_tune(
        tmp_path,
        model,
        tokenizer,
        max_new_tokens=2,
        max_reasoning_tokens=4,
        safety_target="reasoning",
        gate={"max_over_refusal": 0.99},
    )
    with pytest.raises(RejectedError, match=r"never left the reasoning.*`measure\.max_reasoning"):
        trainer.train()
    report = callback.report
    validate(report, SCHEMA)
    assert report["measured"]["after"]["unfinished"]["share"] == 1
    assert report["measured"]["after"]["over_refusal"]["share"] == 0
    assert report["measured"]["max_reasoning_tokens"] == 4
    assert any("never left the reasoning" in warning for warning in report["warnings"])
    assert not (tmp_path / "out" / "safeguarded").exists()


def test_the_arguments_in_the_training_rows_are_those_of_the_prompts(family, tmp_path):
    _, model, tokenizer = family("hybrid")
    trainer, callback = fine_tune(tmp_path, model, tokenizer, column=OFF, dry_run=True)
    with pytest.raises(SystemExit):
        trainer.train()
    report = callback._prepared.plan.report
    assert report.data["chat_template_kwargs"] == OFF
    (told,) = (
        text for text in report.warnings if "was made with `chat_template_kwargs` {}" in text
    )
    assert "Set `data.chat_template_kwargs` to those that you will serve with" in told


def test_extract_names_what_the_template_never_reads_and_what_changes_nothing(family, caplog):
    with pytest.raises(ConfigError, match="`chat_template_kwargs` has `enable_thinkng`"):
        family("hybrid", chat_template_kwargs={"enable_thinkng": False})
    family("hybrid", chat_template_kwargs=OFF, max_reasoning_tokens=77)
    assert "`max_reasoning_tokens` is 77 and changes nothing" in caplog.text
