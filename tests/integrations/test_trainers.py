"""The callback with every trainer that people run, on the columns that each of them takes.

`TRIED` is the list; the table in docs/integrations.md is held to it.
"""

import gc
import json
import re
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.errors import CalibrationDataError
from safegene_trl.step import preparation

from ..conftest import config_of, make_model, make_tokenizer, make_vector, with_lora


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% if tools %}<|system|>tools{% for tool in tools %} {{ tool['function']['name'] }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}call {{ call['function']['name'] }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OTHER = (  # of a row
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "sort", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "sort", "arguments": {"item": 1}}}]
ROWS = 8
END = "<|end|>"
QUICK = {
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
}
# transformers 5.24's name for gradient checkpointing
NEW_NAME = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {each.name for each in fields(TrainingArguments)}
)
GENERATED = {"num_generations": 2, "max_completion_length": 4}


def asks(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def asked(i):
    return f"sort item {i} into a box"


def said(i):
    return f"box {i}"


def part(text):
    return [{"type": "text", "text": text}]


ASKED_AND_SAID = {
    "text": lambda i: (asked(i), f" {said(i)}", " no"),
    "messages": lambda i: ([asks(asked(i))], [says(said(i))], [says("no")]),
}


def pair(kind, i, *names):
    """A row of the named columns: of the prompt, the good answer and the bad one."""
    return dict(zip(names, ASKED_AND_SAID[kind](i), strict=False))


def implicit(kind, i):
    prompt, good, bad = ASKED_AND_SAID[kind](i)
    return {"chosen": prompt + good, "rejected": prompt + bad}


def labelled(kind, i):
    prompt, good, bad = ASKED_AND_SAID[kind](i)
    return {"prompt": prompt, "completion": bad if i % 2 else good, "label": i % 2 == 0}


def called(i):
    turns = [asks(asked(i)), says(None, tool_calls=CALL), {"role": "tool", "content": "3"}]
    return {"messages": [*turns, says(said(i))], "tools": TOOLS}


def ids_of(tokenizer, i):
    row = [asks(asked(i)), says(said(i))]
    ids = tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(row[:1], add_generation_prompt=True)["input_ids"]
    return ids, prompt


def with_labels(tokenizer, i):
    ids, prompt = ids_of(tokenizer, i)
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def with_image(i):
    shown = [{"type": "image"}, *part(asked(i))] if i % 2 else part(asked(i))
    return {"messages": [{"role": "user", "content": shown}, says(part(said(i)))]}


REPLY = {said(i) + END for i in range(ROWS)}
SPACED = {f" {reply}" for reply in REPLY}
TEXTS = {f" item {i} into a box {said(i)}{END}" for i in range(ROWS)}
ALL = range(ROWS)
EVEN = {said(i) + END for i in ALL if i % 2 == 0}
UNDESIRABLE = {"an answer that is labelled undesirable"}
NONE = CalibrationDataError
# of every trainer, by what its data set has: a row, the words that utility is measured on (or the
# error before the first step), and why rows are skipped
TRIED = {
    "SFTTrainer": {
        "`messages`": (lambda i: {"messages": [asks(asked(i)), says(said(i))]}, REPLY),
        "`messages` with a system turn": (
            lambda i: {
                "messages": [
                    {"role": "system", "content": "be kind"},
                    asks(asked(i)),
                    says(said(i)),
                ]
            },
            REPLY,
        ),
        "`messages` of several replies": (
            lambda i: {"messages": [asks(asked(i)), says(said(i)), asks("and"), says("ok")]},
            REPLY | {f"ok{END}"},
        ),
        "`messages` of content parts": (
            lambda i: {
                "messages": [
                    {"role": "user", "content": part(asked(i))},
                    {"role": "assistant", "content": part(said(i))},
                ]
            },
            REPLY,
        ),
        "`messages` with tool calls without content, and `tools`": (
            called,
            REPLY | {f"call sort{END}"},
        ),
        "`messages`, `tools` as JSON": (
            lambda i: {"messages": [asks(asked(i)), says(said(i))], "tools": json.dumps(TOOLS)},
            REPLY,
        ),
        "`prompt`, `completion` (text)": (
            lambda i: pair("text", i, "prompt", "completion"),
            SPACED,
        ),
        "`prompt`, `completion` (messages)": (
            lambda i: pair("messages", i, "prompt", "completion"),
            REPLY,
        ),
        "`text`": (lambda i: {"text": f"{asked(i)} {said(i)}"}, TEXTS),
    },
    "DPOTrainer": {
        "`prompt`, `chosen`, `rejected` (text)": (
            lambda i: pair("text", i, "prompt", "chosen", "rejected"),
            SPACED,
        ),
        "`prompt`, `chosen`, `rejected` (messages)": (
            lambda i: pair("messages", i, "prompt", "chosen", "rejected"),
            REPLY,
        ),
        "`chosen`, `rejected` (text)": (lambda i: implicit("text", i), SPACED),
        "`chosen`, `rejected` (messages)": (lambda i: implicit("messages", i), REPLY),
        "`prompt`, `chosen`, `rejected`, `tools`": (
            lambda i: pair("messages", i, "prompt", "chosen", "rejected") | {"tools": TOOLS},
            REPLY,
        ),
    },
    "KTOTrainer": {
        "`prompt`, `completion`, `label` (text)": (
            lambda i: labelled("text", i),
            {f" {reply}" for reply in EVEN},
            UNDESIRABLE,
        ),
        "`prompt`, `completion`, `label` (messages)": (
            lambda i: labelled("messages", i),
            EVEN,
            UNDESIRABLE,
        ),
        "`prompt`, `chosen`, `rejected`": (
            lambda i: pair("messages", i, "prompt", "chosen", "rejected"),
            REPLY,
            UNDESIRABLE,
        ),
        "`chosen`, `rejected`": (lambda i: implicit("messages", i), REPLY, UNDESIRABLE),
        "every `label` false": (lambda i: labelled("messages", 1), NONE, UNDESIRABLE),
    },
    "ORPOTrainer": {
        "`prompt`, `chosen`, `rejected` (text)": (
            lambda i: pair("text", i, "prompt", "chosen", "rejected"),
            SPACED,
        ),
        "`prompt`, `chosen`, `rejected` (messages)": (
            lambda i: pair("messages", i, "prompt", "chosen", "rejected"),
            REPLY,
        ),
        "`chosen`, `rejected` (messages)": (lambda i: implicit("messages", i), REPLY),
    },
    "CPOTrainer": {
        "`prompt`, `chosen`, `rejected` (messages)": (
            lambda i: pair("messages", i, "prompt", "chosen", "rejected"),
            REPLY,
        ),
    },
    "GRPOTrainer": {
        "`prompt` (text)": (lambda i: pair("text", i, "prompt"), NONE),
        "`prompt` (messages)": (lambda i: pair("messages", i, "prompt"), NONE),
        "`prompt`, and `data.task_data`": (lambda i: pair("messages", i, "prompt"), REPLY),
        "`prompt`, `completion`": (lambda i: pair("messages", i, "prompt", "completion"), REPLY),
    },
    "RLOOTrainer": {
        "`prompt` (messages)": (lambda i: pair("messages", i, "prompt"), NONE),
        "`prompt`, and `data.task_data`": (lambda i: pair("messages", i, "prompt"), REPLY),
    },
    "Trainer": {
        "`input_ids`, `labels` of the answer": (with_labels, REPLY),
        "`input_ids`": (lambda tokenizer, i: {"input_ids": ids_of(tokenizer, i)[0]}, REPLY),
        "`messages`, with a collator of your own": (
            lambda i: {"messages": [asks(asked(i)), says(said(i))]},
            REPLY,
        ),
        "`messages` of which some have an image": (with_image, EVEN, {"images, video or sound"}),
    },
}
CASES = [(trainer, form) for trainer, forms in TRIED.items() for form in forms]


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = make_tokenizer(("<|tool|>",))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def vector(tmp_path_factory, chat_tokenizer):
    folder = tmp_path_factory.mktemp("vector")
    found = make_vector(make_model(), chat_tokenizer)
    found.save_pretrained(folder)
    return found, folder


@pytest.fixture
def settings(vector, monkeypatch):
    """Accepts whatever a random vector does to a random model, and measures nothing."""
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *losses: "")

    def make(**values):
        quick = {"utility_weight": 0.0, "max_evaluations": 2}
        return config_of(**{"vector": str(vector[1]), "num_test_prompts": 0} | quick | values)

    return make


def built(kind, folder, rows, tokenizer, callbacks, model=None, **more):
    """One of the trainers, on a tiny model."""
    arguments = {**QUICK, "output_dir": str(folder)} | more.pop("arguments", {})
    given = {
        "model": model or make_model(),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": callbacks,
        **more,
    }
    if kind == "Trainer":
        given["data_collator"] = collator_for(rows[0], tokenizer)
        raw = "messages" in rows[0]
        return Trainer(args=TrainingArguments(remove_unused_columns=not raw, **arguments), **given)
    if kind in ("GRPOTrainer", "RLOOTrainer"):
        given["reward_funcs"] = lambda completions, **_: [float(len(str(c))) for c in completions]
        arguments |= GENERATED | {"beta": 0.0}
    if kind in ("DPOTrainer", "KTOTrainer") and "ref_model" not in given:
        adapted = "peft_config" in given or isinstance(given["model"], PeftModel)
        given |= {} if adapted else {"ref_model": make_model()}
    trainer, config = {
        "SFTTrainer": (SFTTrainer, SFTConfig),
        "DPOTrainer": (DPOTrainer, DPOConfig),
        "KTOTrainer": (KTOTrainer, KTOConfig),
        "ORPOTrainer": (ORPOTrainer, ORPOConfig),
        "CPOTrainer": (CPOTrainer, CPOConfig),
        "GRPOTrainer": (GRPOTrainer, GRPOConfig),
        "RLOOTrainer": (RLOOTrainer, RLOOConfig),
    }[kind]
    return trainer(args=config(**arguments), **given)


def collator_for(row, tokenizer):
    if "labels" in row:
        return DataCollatorForSeq2Seq(tokenizer)
    language = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if "input_ids" in row:
        return language

    def own(rows):
        texts = [f"{asked(0)} {said(0)}" for _ in rows]  # what it makes of an image is its affair
        return language([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])

    return own


def rows_of(make, tokenizer):
    takes_tokenizer = make.__code__.co_argcount == 2
    return [make(tokenizer, i) if takes_tokenizer else make(i) for i in range(ROWS)]


def responses(samples, tokenizer):
    """Each stretch of response tokens of all samples, decoded."""
    found = set()
    for sample in samples:
        marked = zip(sample.input_ids, sample.is_response, strict=True)
        ids = [token if response else None for token, response in marked]
        for start, token in enumerate(ids):
            if token is not None and (start == 0 or ids[start - 1] is None):
                end = next((at for at in range(start, len(ids)) if ids[at] is None), len(ids))
                found.add(tokenizer.decode(ids[start:end]))
    return found


class Steps(TrainerCallback):
    count = 0

    def on_step_end(self, *args, **kwargs):
        self.count += 1


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_what_utility_is_measured_on(kind, form, settings, chat_tokenizer, tmp_path, monkeypatch):
    make, expected, *skips = TRIED[kind][form]
    shots = []
    gather = preparation.gather_shots
    monkeypatch.setattr(
        preparation, "gather_shots", lambda *a, **k: shots.append(gather(*a, **k)) or shots[-1]
    )
    values = {}
    if "task_data" in form:
        values["task_data"] = str(tmp_path / "task.jsonl")
        lines = [json.dumps(pair("messages", i, "prompt", "completion")) for i in ALL]
        Path(values["task_data"]).write_text("\n".join(lines))
    callback, steps = SafeGeneCallback(settings(**values)), Steps()
    rows = rows_of(make, chat_tokenizer)
    trainer = built(kind, tmp_path / "out", rows, chat_tokenizer, [callback, steps])
    if expected is NONE:
        words = "labelled undesirable" if skips else "holds prompts alone"
        with pytest.raises(CalibrationDataError, match=rf"{words}.*set `data\.task_data`"):
            trainer.train()
        assert steps.count == 0
        return
    trainer.train()
    assert callback.report["status"] == "safeguarded" and steps.count == 1
    task = shots[0].data.task
    assert responses([*task.fit, *task.held_out], chat_tokenizer) == expected
    assert set(callback.report["data"]["task"].get("skipped", {})) == (skips[0] if skips else set())
    said_so = [text for text in callback.report["warnings"] if "rows of the training set" in text]
    assert len(said_so) == len(skips)
    assert all(re.match(r"\d+ rows .* were skipped: \d+ with ", text) for text in said_so)


def test_rows_are_read_by_the_chat_template_that_they_bring_along(
    settings, chat_tokenizer, tmp_path, monkeypatch
):
    """The loader leaves the column out; the trainer, which `attach` knows, has it."""
    shots = []
    gather = preparation.gather_shots
    monkeypatch.setattr(
        preparation, "gather_shots", lambda *a, **k: shots.append(gather(*a, **k)) or shots[-1]
    )
    own = {"chat_template_kwargs": {"chat_template": OTHER}}
    rows = [{"messages": [asks(asked(i)), says(said(i))], **own} for i in ALL]
    trainer = built("SFTTrainer", tmp_path / "out", rows, chat_tokenizer, [])
    callback = SafeGeneCallback(settings())
    callback.attach(trainer)
    trainer.train()
    task = shots[0].data.task
    assert responses([*task.fit, *task.held_out], chat_tokenizer) == REPLY
    warnings = callback.report["warnings"]
    assert any("task samples are written with a chat template that their" in w for w in warnings)


def test_the_documents_name_what_is_tried():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    table = page.split("<!-- tried -->\n")[1].split("\n\n")[0]
    assert table == as_table(), f"the table in docs/integrations.md should be:\n{as_table()}"


def as_table():
    """A line for each trainer and what the step does with its columns."""
    lines: dict[tuple[str, str], list[str]] = {}
    for trainer, forms in TRIED.items():
        for form, (_, expected, *skips) in forms.items():
            step = "utility on the answers"
            if expected is NONE:
                step = "asks for `data.task_data` before the first training step"
            elif skips:
                step = f"utility on the answers; skips {', '.join(skips[0])}"
            lines.setdefault((trainer, step), []).append(form)
    rows = [
        f"| `{trainer}` | {'; '.join(forms)} | {step} |" for (trainer, step), forms in lines.items()
    ]
    return "\n".join(
        ["| trainer | columns of the training set | safety step |", "| --- | --- | --- |", *rows]
    )


class Watch(TrainerCallback):
    """How a model stands before the safety step, which comes after it."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.before = standing(model)


def standing(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    config = model.config.to_dict()
    for key in ("architectures", "dtype"):  # the trainer's own saving fills them in
        config.pop(key, None)
    return {
        "config": config,
        "generation": model.generation_config.to_dict(),
        "trained": {name: each.requires_grad for name, each in model.named_parameters()},
        "weights": {name: each.clone() for name, each in model.state_dict().items()},
        "modules": {
            name: (
                each.training,
                vars(each).get("forward"),
                vars(each).get("gradient_checkpointing"),
                vars(each).get("_gradient_checkpointing_func"),
                *(list(getattr(each, kind).values()) for kind in hooks),
            )
            for name, each in model.named_modules()
        },
    }


def same(one, other):
    weights = one.pop("weights"), other.pop("weights")
    return one == other and all(torch.equal(each, weights[1][n]) for n, each in weights[0].items())


GO_ON = {
    "SFTTrainer": "`messages`",
    "DPOTrainer": "`prompt`, `chosen`, `rejected` (messages)",
    "KTOTrainer": "`prompt`, `completion`, `label` (messages)",
    "ORPOTrainer": "`prompt`, `chosen`, `rejected` (messages)",
    "GRPOTrainer": "`prompt`, `completion`",
    "Trainer": "`input_ids`, `labels` of the answer",
}


@pytest.mark.parametrize("kind", GO_ON)
def test_the_training_goes_on_and_its_models_are_as_they_were(
    kind, settings, chat_tokenizer, tmp_path
):
    """The policy is left as it was, the reference model is not touched, and neither outlives the
    trainer.
    """
    rows = rows_of(TRIED[kind][GO_ON[kind]][0], chat_tokenizer)
    callback, watch, arguments = SafeGeneCallback(settings()), Watch(), {}
    if kind != "ORPOTrainer":  # whose own training does not go on with it
        arguments = {NEW_NAME if kind == "Trainer" else "gradient_checkpointing": True}
    trainer = built(kind, tmp_path, rows, chat_tokenizer, [watch, callback], arguments=arguments)
    callback.attach(trainer)
    reference = getattr(trainer, "ref_model", None)
    assert (reference is not None) == (kind in ("DPOTrainer", "KTOTrainer"))
    standing_reference = standing(reference) if reference is not None else None
    trainer.train()
    assert same(standing(trainer.model), watch.before)
    assert callback.report["status"] == "safeguarded"
    if reference is not None:
        assert same(standing(reference), standing_reference)
    trainer.train()
    assert callback.report["status"] == "safeguarded"
    kept = [weakref.ref(model) for model in (trainer.model, reference) if model is not None]
    del trainer, reference, standing_reference, watch
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
    assert callback.report


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12) + 5).logits


def two_adapters():
    model = with_lora(make_model())
    model.add_adapter("other", model.peft_config["default"])
    return model


def both_active():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return model


ADAPTED = {  # what is trained, and whether TRL keeps its beginning as the adapter `ref`
    "a new LoRA": (make_model, {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")}, False),
    "a LoRA": (lambda: with_lora(make_model()), {}, True),
    "one of two LoRAs": (two_adapters, {}, True),
    "two LoRAs, and a reference model": (both_active, {"ref_model": make_model}, False),
    "a named LoRA, and a reference model": (
        lambda: with_lora(make_model(), adapter_name="task"),
        {"ref_model": make_model},
        False,
    ),
}


@pytest.mark.parametrize("output_format", ["merged", "adapter"])
@pytest.mark.parametrize(
    ("kind", "trained"),
    [("DPOTrainer", each) for each in ADAPTED]
    + [pytest.param("KTOTrainer", each, marks=pytest.mark.exhaustive) for each in ADAPTED],
)
def test_the_policy_is_what_the_vector_is_added_to(
    kind, trained, output_format, settings, vector, chat_tokenizer, tmp_path
):
    made, more, has_reference = ADAPTED[trained]
    callback = SafeGeneCallback(settings(output_format=output_format))
    rows = rows_of(TRIED[kind][GO_ON[kind]][0], chat_tokenizer)
    more = {name: each() if callable(each) else each for name, each in more.items()}
    arguments = {"learning_rate": 0.05, "gradient_checkpointing": False}
    trainer = built(
        kind, tmp_path, rows, chat_tokenizer, [callback], made(), arguments=arguments, **more
    )
    assert ("ref" in trainer.model.peft_config) == has_reference
    start = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    assert all(torch.equal(p, trainer.model.get_parameter(n)) for n, p in start.items())
    expected = trainer.model.merge_and_unload()
    space = vector[0].space(callback.report["config"]["search"]["granularity"])
    by_module = space.by_module(callback.report["coefficients"])
    assert any(bool(value.any()) for value in by_module.values())
    with torch.no_grad():
        for name, delta in vector[0].deltas.items():
            change = delta.b @ (by_module[name][:, None] * delta.a)
            expected.get_submodule(name).weight += change
    folder = tmp_path / "safeguarded"
    if output_format == "merged":
        written = AutoModelForCausalLM.from_pretrained(folder)
    else:
        written = PeftModel.from_pretrained(make_model(), folder)
    torch.testing.assert_close(logits(written), logits(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 off", "bf16 on"])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
def test_the_checkpoint_is_in_the_type_that_the_model_was_loaded_in(
    loaded, autocast, lora, settings, chat_tokenizer, tmp_path
):
    if loaded == "float16" and autocast:
        pytest.skip("a random model in two types of 16 bits: nothing is accepted")
    make_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=loaded)
    rows = rows_of(TRIED["SFTTrainer"]["`messages`"][0], chat_tokenizer)
    callback = SafeGeneCallback(settings())
    more = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")} if lora else {}
    trainer = built(
        "SFTTrainer",
        tmp_path / "out",
        rows,
        chat_tokenizer,
        [callback],
        model,
        arguments={"bf16": autocast, "gradient_checkpointing": False},
        **more,
    )
    trainer.train()
    folder = tmp_path / "out" / "safeguarded"
    written = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{loaded}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == loaded
    assert callback.report["shipped"]["rounding"]["kept"] > 0.9
