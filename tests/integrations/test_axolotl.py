"""The plugin against axolotl's own plugin interface; `make test-integrations` runs it where axolotl
is installed, in an environment of its own.
"""

import json

import pytest
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safegene_trl.data.rows import conversation
from safegene_trl.errors import ConfigError
from safegene_trl.models.inputs import tokenize

from ..conftest import in_groups, make_model, task_dataset


base = pytest.importorskip("axolotl.integrations.base")
PLUGIN = "safegene_trl.integrations.axolotl.SafeGenePlugin"


@pytest.fixture
def manager():
    base.PluginManager._instance = None
    found = base.PluginManager.get_instance()
    yield found
    base.PluginManager._instance = None


@pytest.fixture
def settings(vector_dir):
    return in_groups(
        {
            "vector": str(vector_dir),
            "max_evaluations": 1,
            "num_test_prompts": 2,
            "gate": {"max_over_refusal": 1.0},
        }
    )


def test_the_block_is_part_of_axolotls_yaml(manager, settings):
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault

    manager.cfg = DictDefault({"safegene": settings})
    manager.register(PLUGIN)
    _, schema = merge_input_args()
    assert "safegene" in schema.model_fields


@pytest.mark.parametrize(
    ("block", "message"),
    [(None, "needs a `safegene` block"), ({"vector": "v", "shots": 3}, "Unknown key `shots`")],
)
def test_a_bad_block_is_refused_when_the_yaml_is_read(manager, block, message):
    plugin = base.load_plugin(PLUGIN)
    with pytest.raises(ConfigError, match=message):
        plugin.register({"safegene": block})


def test_the_trainer_ends_with_the_safety_step(manager, settings, tokenizer, tmp_path):
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault({"safegene": settings})
    manager.cfg = cfg
    manager.register(PLUGIN)
    rows = []
    for row in task_dataset():
        sample = tokenize(tokenizer, *conversation(row))
        labels = [
            t if r else -100 for t, r in zip(sample.input_ids, sample.is_response, strict=True)
        ]
        rows.append({"input_ids": sample.input_ids, "labels": labels})
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    for callback in manager.add_callbacks_post_trainer(cfg, trainer):  # what axolotl does with them
        trainer.add_callback(callback)
    trainer.train()
    report = json.loads((tmp_path / "safeguarded" / "safegene_report.json").read_text())
    assert report["decision"]["outcome"] == "accepted"
    AutoModelForCausalLM.from_pretrained(tmp_path / "safeguarded")
