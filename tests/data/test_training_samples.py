"""The tokens that the utility term reads are the assistant's words, whatever a trainer has made of
the rows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import BatchEncoding
from trl import SFTConfig, SFTTrainer

from safegene_trl.data.rows import with_arguments
from safegene_trl.data.sources import draw
from safegene_trl.data.training_samples import TrainingSamples
from safegene_trl.data.turns import TurnMarks
from safegene_trl.errors import CalibrationDataError
from safegene_trl.models.inputs import Sample

from ..conftest import make_model, make_tokenizer
from ..reasoning_templates import reasoning_tokenizer


MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNT = 12


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def asked(i):
    return f"sort item {i} {'please ' * (i % 5)}now"


def said(i):
    return f"box {i} {'it is ' * (i % 3)}ok"


FORMATS = {  # of row number i: its columns, and the assistant's words in it
    "strings": lambda i: (
        {"prompt": asked(i), "completion": f" {said(i)}"},
        [f" {said(i)}<|end|>"],
    ),
    "chat": lambda i: (
        {"prompt": [user(asked(i))], "completion": [assistant(said(i))]},
        [f"{said(i)}<|end|>"],
    ),
    "messages": lambda i: (
        {"messages": [user(asked(i)), assistant(said(i))]},
        [f"{said(i)}<|end|>"],
    ),
    "system": lambda i: (
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                user(asked(i)),
                assistant(said(i)),
            ]
        },
        [f"{said(i)}<|end|>"],
    ),
    "turns": lambda i: (
        {
            "messages": [
                user(asked(i)),
                assistant(said(i)),
                user("and then"),
                assistant(f"then {i}"),
            ]
        },
        [f"{said(i)}<|end|>", f"then {i}<|end|>"],
    ),
    "text": lambda i: (
        {"text": f"a text about {i}{' more' * (i % 4)}"},
        [f"a text about {i}{' more' * (i % 4)}<|end|>"],
    ),
}
MODES = {
    "plain": {},
    "assistant only": {"assistant_only_loss": True},
    "whole loss": {"completion_only_loss": False},
    "packed": {"packing": True, "max_length": 120},
    "packed and split": {"packing": True, "max_length": 120, "packing_strategy": "bfd_split"},
    "padding-free": {"padding_free": True, "max_length": None},
    "torch": {},
    "numpy": {},
    "streamed": {"max_steps": 1},
    "streamed and packed": {"max_steps": 1, "packing": True, "max_length": 120},
}
CONVERSATIONS = ("messages", "system", "turns", "chat")


def marked_tokenizer(marked):
    tokenizer = make_tokenizer()
    if marked:
        tokenizer.chat_template = MARKED
    return tokenizer


def trainer_rows(folder, rows, tokenizer, mode="plain", **options):
    """The rows as a callback sees them: those of the loader, after TRL's own preparation."""
    data = Dataset.from_list(rows)
    if mode.startswith("streamed"):
        data = data.to_iterable_dataset()
    args = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(make_model(), args=args, train_dataset=data, processing_class=tokenizer)
    if mode in ("torch", "numpy"):
        trainer.train_dataset.set_format(mode)
    return trainer.get_train_dataloader().dataset


def runs(sample, tokenizer):
    """Each stretch of response tokens, decoded."""
    stretches, open_ = [], False
    for token, is_response in zip(sample.input_ids, sample.is_response, strict=True):
        if is_response and not open_:
            stretches.append([])
        if is_response:
            stretches[-1].append(token)
        open_ = is_response
    return [tokenizer.decode(stretch) for stretch in stretches]


def take(rows, tokenizer, count=64, **options):
    return TrainingSamples(rows, tokenizer, **options).take(count, 0, None, 10**6)


@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
def test_exactly_the_assistants_words_are_read(form, mode, marked, tmp_path):
    if mode == "assistant only" and (form not in CONVERSATIONS or not marked):
        pytest.skip("TRL refuses it")
    if mode == "whole loss" and form == "strings":
        pytest.skip("no prompt is left in the row: see below")
    tokenizer = marked_tokenizer(marked)
    made = [FORMATS[form](i) for i in range(COUNT)]
    rows = trainer_rows(tmp_path, [row for row, _ in made], tokenizer, mode, **MODES[mode])
    samples = take(rows, tokenizer)
    if form == "text":  # nothing predicts the first token
        read = sorted(tokenizer.decode(sample.input_ids) for sample in samples)
        assert all(
            sample.is_response == [False] + [True] * (len(sample.input_ids) - 1)
            for sample in samples
        )
        assert read == sorted(words for _, (words,) in made)
    else:
        assert sorted(runs(sample, tokenizer) for sample in samples) == sorted(
            words for _, words in made
        )


@pytest.mark.parametrize("told", [None, True], ids=["not told", "told"])
@pytest.mark.parametrize("form", FORMATS)
def test_rows_packed_without_boundaries(form, told, tmp_path):
    tokenizer = make_tokenizer()
    made = [FORMATS[form](i) for i in range(40)]
    rows = trainer_rows(
        tmp_path,
        [row for row, _ in made],
        tokenizer,
        packing=True,
        packing_strategy="wrapped",
        max_length=70,
    )
    samples = TrainingSamples(rows, tokenizer, packed=told).take(100, 0, None, 10**6)
    assert len(samples) >= 20
    words = {reply for _, replies in made for reply in replies}
    texts = [whole(row, tokenizer) for row, _ in made]
    for sample in samples:
        # of one sample alone
        assert any(tokenizer.decode(sample.input_ids) in text for text in texts)
        if form in CONVERSATIONS:  # no question is cut
            assert tokenizer.decode(sample.input_ids[:1]) in ("<|user|>", "<|system|>")
        *complete, last = runs(sample, tokenizer)
        assert form == "text" or (
            set(complete) <= words and any(word.startswith(last) for word in words)
        )


def whole(row, tokenizer):
    if "text" in row:
        return row["text"] + "<|end|>"
    if isinstance(row.get("prompt"), str):
        return row["prompt"] + row["completion"] + "<|end|>"
    messages = row.get("messages") or row["prompt"] + row["completion"]
    return tokenizer.apply_chat_template(messages, tokenize=False)


MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    " [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
REAL = {  # the special tokens of each template that TRL ships
    "qwen2_5": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|end|>"],
    "glm4moe": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"],
    "gptoss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
    "deepseekv3": [
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ],
}


def with_template(template, special):
    tokenizer = make_tokenizer(
        tuple(token for token in special if token not in ("<|user|>", "<|assistant|>", "<|end|>"))
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token = special[0]
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", [*REAL, "mistral", "mistral with markers as text"])
def test_templates_of_real_models(name):
    special = REAL.get(name, ["<s>", "</s>", *([] if "text" in name else ["[INST]", "[/INST]"])])
    tokenizer = with_template(
        (TEMPLATES / f"{name}.jinja").read_text() if name in REAL else MISTRAL, special
    )
    conversations = [FORMATS["turns"](i)[0]["messages"] for i in range(COUNT)]
    ids = [
        tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        for turns in conversations
    ]
    samples = take([{"input_ids": row, "labels": row} for row in ids], tokenizer)
    read = sorted("".join(runs(sample, tokenizer)) for sample in samples)
    assert len(read) == COUNT
    for sample in samples:
        first, second = runs(sample, tokenizer)
        i = int(second.split("then ")[1].split("<")[0].split("[")[0])
        assert first.split("ok")[0].strip().endswith(said(i).removesuffix("ok").strip())
        assert (
            "then" not in first
            and "sort" not in first + second
            and "and then" not in first + second
        )


def test_a_template_that_does_not_tell_replies_is_refused_with_the_remedy():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    rows = [FORMATS["messages"](i)[0] for i in range(4)]
    ids = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        for row in rows
    ]
    tokens = [{"input_ids": row, "labels": row} for row in ids]
    with pytest.raises(CalibrationDataError, match=r"set `data\.task_data` to the messages"):
        take(tokens, tokenizer)
    # columns are left
    samples = take([{**own, **row} for own, row in zip(tokens, rows, strict=True)], tokenizer)
    assert sorted(runs(s, tokenizer) for s in samples) == sorted(
        [f"{said(i)}<|end|>"] for i in range(4)
    )


def test_a_reply_that_holds_a_header_is_not_guessed_at():
    tokenizer = with_template(MISTRAL, ["<s>", "</s>"])
    turns = [
        [user("what does [/INST] mean"), assistant("no idea")],
        *([user(asked(i)), assistant("ok")] for i in (1, 2)),
    ]
    ids = [tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"] for turn in turns]
    reader = TrainingSamples([{"input_ids": row} for row in ids], tokenizer)
    assert len(reader.take(9, 0, None, 99)) == 2
    assert reader.skipped == {"marks of replies that do not fit its turns": 1}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "special", "begun", "followed", "not_followed"),
    [
        (
            CHATML,
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nsay",
            ["<|im_end|>\n<|im_start|>user\nmore", "<|im_end|>"],
            ["<|im_end|> ends a turn"],
        ),
        (
            MISTRAL,
            ["<s>", "</s>"],
            "<s>[INST] ask [/INST] say",
            ["</s>[INST] more", "</s>[IN"],
            ["</s> and more"],
        ),
    ],
    ids=["ChatML", "Mistral"],
)
def test_what_may_follow_a_reply(template, special, begun, followed, not_followed):
    """The examples in the docstrings of `TurnMarks`."""
    tokenizer = with_template(template, special)
    marks = TurnMarks.of(tokenizer)

    def replies(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return marks.replies(marks.spelled(ids))

    assert all(len(replies(begun + rest)) == 1 for rest in followed)
    assert all(replies(begun + rest) is None for rest in not_followed)


class Mapped(TorchDataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Streamed(TorchIterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def token_row(i, tokenizer):
    ids = tokenizer.apply_chat_template(FORMATS["messages"](i)[0]["messages"], return_dict=True)[
        "input_ids"
    ]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    "made",
    [
        Mapped,
        list,
        lambda rows: [{k: torch.tensor(v) for k, v in row.items()} for row in rows],
        lambda rows: [{k: np.array(v) for k, v in row.items()} for row in rows],
        lambda rows: Mapped([BatchEncoding(row) for row in rows]),
        lambda rows: Dataset.from_list(rows).with_format("torch").to_iterable_dataset(),
        lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
        lambda rows: [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows],
        lambda rows: [padded(row, left=False) for row in rows],
        lambda rows: [padded(row, left=True) for row in rows],
    ],
)
def test_any_kind_of_data_set(made, tokenizer):
    samples = take(made([token_row(i, tokenizer) for i in range(COUNT)]), tokenizer)
    assert sorted(runs(s, tokenizer) for s in samples) == sorted(
        [f"{said(i)}<|end|>"] for i in range(COUNT)
    )
    assert not any(0 in sample.input_ids for sample in samples)


def padded(row, left):
    """The row filled up to 100 tokens, padding masked and left out of the labels."""
    free = 100 - len(row["input_ids"])
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    row = {**row, "attention_mask": [1] * len(row["input_ids"])}
    return {k: [fill[k]] * free + row[k] if left else row[k] + [fill[k]] * free for k in fill}


def test_padding_is_no_context(tokenizer):
    row = {
        "input_ids": [0, 0, 5, 6, 7, 1, 0],
        "labels": [-100] * 4 + [7, 1, -100],
        "attention_mask": [0, 0, 1, 1, 1, 1, 0],
    }
    assert take([row] * 2, tokenizer) == [Sample([5, 6, 7, 1], [False, False, True, True])] * 2


@pytest.mark.parametrize("how", ["position_ids", "attention_mask", "seq_lengths"])
def test_packed_by_others(how, tokenizer):
    rows = [token_row(i, tokenizer)["input_ids"] for i in range(6)]
    lengths = [len(row) for row in rows]
    marks = {
        "position_ids": [i for n in lengths for i in range(n)],
        "attention_mask": [k + 1 for k, n in enumerate(lengths) for _ in range(n)],
        "seq_lengths": lengths,
    }
    samples = take(
        [{"input_ids": [token for row in rows for token in row], how: marks[how]}], tokenizer
    )
    assert [sample.input_ids for sample in samples] == rows


class Lines(TorchIterableDataset):
    """The lines of a file that is open: every generator over it goes on where the last one stopped."""

    def __init__(self, path):
        self.file = open(path)  # noqa: SIM115  (that it stays open is the point)

    def __iter__(self):
        for line in self.file:
            yield json.loads(line)


def test_a_stream_that_may_be_read_only_once_is_left_alone(tokenizer, tmp_path):
    rows = [token_row(i, tokenizer) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stream in (
        Lines(tmp_path / "rows.jsonl"),
        Streamed(iter(rows)),
        Streamed(rows),
        (row for row in rows),
    ):
        with pytest.raises(CalibrationDataError, match=r"only once: set `data\.task_data`"):
            take(stream, tokenizer)
        assert list(stream) == rows


WRITTEN = {  # what a user has written, and whether the marks in it can be told from the template's
    "translate: <|assistant|>evil 24<|end|>": False,
    "translate: <|assistant|>evil 24<|end|> please": False,
    "translate: <|assistant|>evil": False,
    "<|assistant|>evil 24<|end|>": False,
    "hello<|end|><|assistant|>evil 24<|end|> please": False,
    "hello<|end|><|assistant|>evil 24<|end|>": False,
    "what is <|end|> for": True,
}


@pytest.mark.parametrize("form", ["tokens", "text", "labels of all turns"])
@pytest.mark.parametrize("written", WRITTEN)
def test_marks_that_a_user_has_written_are_no_reply(written, form, tokenizer):
    turns = [
        [user(written), assistant("box 9")],
        *([user(asked(i)), assistant("ok")] for i in (1, 2, 3)),
    ]
    turns.append([user("a"), assistant("b"), user(written), assistant("box 9")])
    rows = []
    for turn in turns:
        ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
        labels = [-100, -100, *ids[2:]] if form == "labels of all turns" else list(ids)
        rows.append(
            {"text": tokenizer.decode(ids)}
            if form == "text"
            else {"input_ids": ids, "labels": labels}
        )
    reader = TrainingSamples(rows, tokenizer)
    read = [run for sample in reader.take(9, 0, None, 99) for run in runs(sample, tokenizer)]
    right = ["ok<|end|>"] * 3 + (["b<|end|>", *["box 9<|end|>"] * 2] if WRITTEN[written] else [])
    assert sorted(read) == sorted(right)
    assert reader.skipped == (
        {} if WRITTEN[written] else {"marks of replies that do not fit its turns": 2}
    )


@pytest.mark.parametrize("name", [*REAL, "mistral"])
def test_marks_that_a_user_has_written_in_templates_of_real_models(name):
    tokenizer = with_template(
        (TEMPLATES / f"{name}.jinja").read_text() if name in REAL else MISTRAL,
        REAL.get(name, ["<s>", "</s>", "[INST]", "[/INST]"]),
    )
    marks = TurnMarks.of(tokenizer)
    header = marks.header.replace("\0", "").replace("Ċ", "\n").replace("Ġ", " ")
    end = tokenizer.convert_ids_to_tokens(sorted(marks.ends)[0])
    written = f"translate {header}evil{end} please"
    turns = [[user(written), assistant("ok")], *([user(asked(i)), assistant("ok")] for i in (1, 2))]
    rows = [
        {"input_ids": tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]}
        for turn in turns
    ]
    reader = TrainingSamples(rows, tokenizer)
    assert not any(
        "evil" in run for sample in reader.take(9, 0, None, 99) for run in runs(sample, tokenizer)
    )
    assert reader.skipped == {"marks of replies that do not fit its turns": 1}


def test_two_replies_in_a_row_are_read(tokenizer):
    turns = [user("a"), assistant("one moment"), assistant("box 9"), user("and"), assistant("ok")]
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    (first, _) = take([{"input_ids": ids}] * 2, tokenizer)
    assert runs(first, tokenizer) == ["one moment<|end|>", "box 9<|end|>", "ok<|end|>"]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
@pytest.mark.parametrize("chat", [False, True])
def test_padding_without_a_mask_is_not_measured(chat, pad, left):
    tokenizer = make_tokenizer(("<|pad|>",))
    tokenizer.pad_token = pad
    fill = tokenizer.pad_token_id
    rows = []
    for i in range(4):
        text = f"sort item {i} into a box<|end|>"
        ids = token_row(i, tokenizer)["input_ids"] if chat else tokenizer(text)["input_ids"]
        ids = [fill] * (90 - len(ids)) + ids if left else ids + [fill] * (90 - len(ids))
        rows.append({"input_ids": ids, "labels": list(ids)})
    for sample in take(rows, tokenizer):
        said = "".join(runs(sample, tokenizer))
        assert said.count(pad) == (pad == "<|end|>") and said.endswith("<|end|>")
        assert sample.input_ids.count(fill) <= (2 + chat if pad == "<|end|>" else 0)


BAD_ROWS = {
    "images, video or sound": {
        "messages": [user([{"type": "image"}, {"type": "text", "text": "what"}]), assistant("a")]
    },
    "no assistant turn": {"messages": [user("hello")]},
    "no prompt": {"question": "hello"},
    "message without a role": {"messages": [{"content": "hello"}, assistant("hi")]},
    "message without content": {"messages": [user("hello"), assistant(None)]},
    "content is not text": {"messages": [user("hello"), assistant(5)]},
    "prompt is not text": {"prompt": 5, "completion": "hi"},
    "prompt is not valid Unicode": {"prompt": "a\ud800b", "completion": "hi"},
    "text is not valid Unicode": {"text": "a\ud800b"},
    "empty reply": {"prompt": "hello", "completion": ""},
    "messages is empty or no list of messages": {"messages": "hello"},
    "no response in its labels": {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
    "token ids that are no list of integers": {"input_ids": [[5, 6], [7, 8]]},
    "labels or masks of another length than the tokens": {"input_ids": [5, 6], "labels": [5]},
    "a row that is no mapping of columns": "hello",
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_what_cannot_be_read_is_skipped_counted_and_replaced(reason, tokenizer):
    good = [FORMATS["messages"](i)[0] for i in range(COUNT)]
    rows = [BAD_ROWS[reason], *good, BAD_ROWS[reason]]
    reader = TrainingSamples(rows, tokenizer)
    assert len(reader.take(COUNT, 0, None, 99)) == COUNT
    few = TrainingSamples([BAD_ROWS[reason]] * 3, tokenizer)
    with pytest.raises(
        CalibrationDataError, match=f"0 usable samples .*3 with {reason}.*set `data.task_data`"
    ):
        few.take(COUNT, 0, None, 99)
    assert few.skipped == {reason: 3}
    assert set(reader.skipped) <= {reason} and reader.read_by == {"chat template": COUNT}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user("a"), assistant("b"), user("c")], ["b<|end|>"]),
        ([user("a"), assistant("b"), {"role": "tool", "content": "c"}], ["b<|end|>"]),
        (
            [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "b"}])],
            ["b<|end|>"],
        ),
        ({"role": ["user", "assistant"], "content": ["a", "b"]}, ["b<|end|>"]),
        (np.array([user("a"), assistant("b")], dtype=object), ["b<|end|>"]),
        ([user("a"), assistant("b"), user("c"), assistant("d")], ["b<|end|>", "d<|end|>"]),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], ["b<|end|>"]),
    ],
)
def test_conversations_that_are_not_tokenised(messages, words, tokenizer):
    samples = take([{"messages": messages}] * 2, tokenizer)
    assert [runs(sample, tokenizer) for sample in samples] == [words] * 2


def test_a_completion_of_several_turns(tokenizer, tmp_path):
    """TRL trains on the user's turn in the middle as well; it is no word of the assistant's."""
    row = {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]}
    for rows in ([row] * 3, trainer_rows(tmp_path, [row] * 3, tokenizer)):
        assert {tuple(runs(s, tokenizer)) for s in take(rows, tokenizer)} == {
            ("b<|end|>", "d<|end|>")
        }


def test_a_prompt_column_tells_where_a_string_completion_begins(tokenizer, tmp_path):
    rows = [FORMATS["strings"](i)[0] for i in range(COUNT)]
    data = trainer_rows(
        tmp_path, rows, tokenizer, completion_only_loss=False, remove_unused_columns=False
    )
    samples = take(data, tokenizer)
    assert sorted(runs(s, tokenizer) for s in samples) == sorted(
        FORMATS["strings"](i)[1] for i in range(COUNT)
    )


def test_a_template_without_a_system_turn(tokenizer):
    strict = make_tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    rows = [FORMATS["messages"](0)[0], FORMATS["system"](1)[0], FORMATS["messages"](2)[0]]
    reader = TrainingSamples(rows, strict)
    assert len(reader.take(3, 0, None, 99)) == 2
    assert reader.skipped == {"refused by the chat template (no system turn)": 1}


def test_the_same_seed_draws_what_it_always_drew(tokenizer):
    rows = [token_row(i, tokenizer) for i in range(50)]
    expected = [row["input_ids"] for row in draw(rows, 8, 3)]
    samples = TrainingSamples(rows, tokenizer).take(8, 3, None, 99)
    assert [sample.input_ids for sample in samples] == expected
    broken = [
        {"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])}
        for row in draw(rows, 8, 3)
    ]
    mixed = [
        broken[expected.index(r["input_ids"])] if r["input_ids"] in expected[:2] else r
        for r in rows
    ]
    more = TrainingSamples(mixed, tokenizer).take(8, 3, None, 99)
    assert [sample.input_ids for sample in more][:6] == expected[2:]
    assert len({tuple(sample.input_ids) for sample in more}) == 8


def test_preferences_as_trl_keeps_them(tokenizer):
    row = {
        "prompt_ids": [5, 6],
        "chosen_ids": [7, 1],
        "rejected_ids": [8, 1],
        "prompt": "a",
        "chosen": "b",
    }
    assert take([row] * 2, tokenizer) == [Sample([5, 6, 7, 1], [False, False, True, True])] * 2


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt_ids": [5], "chosen_ids": None}, "token ids that are no list of integers"),
        ({"prompt_ids": None, "chosen_ids": [5]}, "token ids that are no list of integers"),
        ({"prompt_ids": [5], "completion_ids": "a"}, "token ids that are no list of integers"),
        ({"prompt_ids": [5], "chosen_ids": [7, -1]}, "negative token ids"),
        ({"input_ids": [5, -100], "labels": [5, 6]}, "negative token ids"),
    ],
)
def test_rows_without_usable_tokens_are_skipped_by_name(columns, reason, tokenizer):
    reader = TrainingSamples([columns] + [FORMATS["chat"](i)[0] for i in range(2)], tokenizer)
    assert len(reader.take(3, 0, None, 99)) == 2 and reader.skipped == {reason: 1}


def test_an_error_in_the_users_own_data_set_is_told_in_a_sentence(tokenizer):
    class Broken(Mapped):
        def __getitem__(self, index):
            raise KeyError("image")

    with pytest.raises(
        CalibrationDataError, match="row of the training set cannot be read \\(KeyError"
    ):
        take(Broken([1, 2, 3]), tokenizer)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_beside_the_content_is_read_as_the_template_writes_it(key):
    tokenizer = reasoning_tokenizer("hybrid" if key == "reasoning_content" else "channels")
    messages = [
        {"role": "user", "content": "sort item"},
        {"role": "assistant", "content": "box 2", key: "two fits"},
    ]
    rows = [{"messages": messages}] * 2
    sample = TrainingSamples(rows, tokenizer).take(1, 0, None, 100)[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert "two fits" in whole and tokenizer.decode(sample.input_ids).rstrip("\n") == whole
    said = [t for t, own in zip(sample.input_ids, sample.is_response, strict=True) if own]
    assert "box 2" in tokenizer.decode(said)


def test_rows_without_arguments_for_the_template_get_those_of_the_step():
    tokenizer, off = reasoning_tokenizer("hybrid"), {"enable_thinking": False}
    user = [{"role": "user", "content": "sort item"}]
    rows = [{"prompt": user, "completion": [{"role": "assistant", "content": "box 2"}]}] * 2
    said = []
    for options in ({}, off):
        sample = TrainingSamples(rows, tokenizer, template_options=options).take(1, 0, None, 100)[0]
        said.append(tokenizer.decode(sample.input_ids[sample.is_response.index(True) :]))
    assert said == ["<think>\n\n</think>\n\nbox 2<|end|>", "box 2<|end|>"]


def test_preferences_of_orpo_and_cpo_are_their_tokens(tokenizer):
    """Beside them stands text that the chat template was put around already."""
    row = {
        "prompt": "<|user|>a<|end|><|assistant|>",
        "chosen": "b",
        "chosen_input_ids": [0, 5, 6, 7, 1],
        "chosen_attention_mask": [0, 1, 1, 1, 1],
        "chosen_labels": [-100, -100, -100, 7, 1],
        "rejected_labels": [-100, -100, 8, 1],
    }
    assert take([row] * 2, tokenizer) == [Sample([5, 6, 7, 1], [False, False, True, True])] * 2


@pytest.mark.parametrize(
    ("columns", "skipped"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, True),
        ({"prompt": "a", "completion": "b", "label": True}, False),
        ({"prompt": "a", "completion": "b", "label": 0}, False),  # the first of some classes
        ({"text": "a b c", "label": False}, False),
        ({"prompt_ids": [5, 6], "completion_ids": [7, 1], "label": 0}, True),
        ({"prompt_ids": [5, 6], "completion_ids": [7, 1], "label": True}, False),
        ({"prompt_ids": [5, 6], "completion_ids": [7, 1]}, False),
    ],
)
def test_answers_that_kto_unlearns_are_skipped(columns, skipped, tokenizer):
    reader = TrainingSamples([columns] + [FORMATS["chat"](i)[0] for i in range(2)], tokenizer)
    assert len(reader.take(3, 0, None, 99)) == 3 - skipped
    reason = "an answer that is labelled undesirable"
    assert reader.skipped == ({reason: 1} if skipped else {})


@pytest.mark.parametrize(
    ("columns", "alone"),
    [
        ({"prompt": "a"}, True),
        ({"prompt": [user("a")], "solution": "4"}, True),
        ({"prompt": "a", "completion": ""}, False),
        ({"messages": [user("a")]}, False),
        ({"question": "a"}, False),
    ],
)
def test_prompts_alone_are_told_from_rows_that_cannot_be_read(columns, alone, tokenizer):
    words = "holds prompts alone" if alone else "0 usable samples"
    with pytest.raises(CalibrationDataError, match=rf"{words}.*set `data\.task_data`"):
        take([columns] * 3, tokenizer)


def reasoning_rows(*columns):
    """Rows of which the last ones have these values for the chat template."""
    plain = [FORMATS["chat"](i)[0] for i in range(6)]
    return [*plain, *({**plain[0], "chat_template_kwargs": value} for value in columns)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "are no arguments"),
        ("[1]", "are no arguments"),
        (["enable_thinking"], "are no arguments"),
        (7, "are no arguments"),
        ({"chat_template": 7}, "are no arguments"),
        ({"chat_template": "{% if"}, "refused by the chat template"),
        ({"tools": []}, "are no arguments"),
        ({"enable_thinking": float("nan")}, "are no arguments"),
    ],
)
def test_a_row_with_impossible_arguments_for_the_template_is_skipped_by_name(value, reason):
    samples = TrainingSamples(reasoning_rows(value), reasoning_tokenizer("hybrid"))
    assert len(samples.take(7, 0, 512, 64)) == 6
    ((said, count),) = samples.skipped.items()
    assert reason in said and count == 1
    assert "`chat_template_kwargs`" in said or "chat template" in reason


def test_arguments_that_the_template_never_reads_change_nothing_in_a_row_and_are_counted():
    typo, tokenizer = {"enable_thinkng": False}, reasoning_tokenizer("hybrid")
    rows = reasoning_rows({}, {})
    samples = TrainingSamples(reasoning_rows(typo, json.dumps(typo)), tokenizer)
    assert samples.take(8, 0, 512, 64) == TrainingSamples(rows, tokenizer).take(8, 0, 512, 64)
    ((said, count),) = samples.unread.items()
    assert "`enable_thinkng`, which the chat template never reads" in said and count == 2
    assert not samples.skipped


def test_a_rows_arguments_may_be_json_and_arrow_may_fill_them_up():
    known = {"enable_thinking": False, "chat_template": None}
    rows = reasoning_rows('{"enable_thinking": false}', {"enable_thinking": False}, known, None, "")
    samples = TrainingSamples(rows, reasoning_tokenizer("hybrid"))
    assert len(samples.take(11, 0, 512, 64)) == 11 and not samples.skipped


OTHER = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood }}{% endif %}"
)


def own_rows():
    """Rows of which every second one brings its chat template along."""
    rows = [dict(FORMATS["messages"](i)[0]) for i in range(6)]
    plain = {"chat_template": None, "mood": None}
    own = {"chat_template": OTHER, "mood": "!"}
    return [row | {"chat_template_kwargs": own if i % 2 else plain} for i, row in enumerate(rows)]


@pytest.mark.parametrize("form", ["raw", "JSON", "of TRL"])
def test_a_row_is_read_by_the_chat_template_that_it_brings_along(form, tokenizer, tmp_path):
    rows, replies = own_rows(), [FORMATS["messages"](i)[1] for i in range(6)]
    if form == "JSON":
        rows = [
            row | {"chat_template_kwargs": json.dumps(row["chat_template_kwargs"])} for row in rows
        ]
    if form == "of TRL":
        arguments = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        trainer = SFTTrainer(
            make_model(),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        loaded = trainer.get_train_dataloader().dataset
        assert "chat_template_kwargs" not in loaded.column_names
        rows = with_arguments(loaded, trainer.train_dataset)
    samples = TrainingSamples(rows, tokenizer)
    found = samples.take(6, 0, None, 99)
    assert sorted(runs(sample, tokenizer) for sample in found) == sorted(replies)
    assert samples.own_templates == 3 and not samples.skipped and not samples.unread
    assert samples.read_by == {"chat template": 6}
    heads = [tokenizer.decode(sample.input_ids).split("]")[0] for sample in found]
    assert sum(head == "[user" for head in heads) == 3


def test_columns_are_put_back_only_where_the_rows_are_the_trainers(tokenizer):
    loaded = Dataset.from_list([{"input_ids": [i, 5]} for i in range(3)])
    column = [{"enable_thinking": False}] * 3
    prepared = loaded.add_column("chat_template_kwargs", column)
    assert with_arguments(loaded, prepared).column_names == prepared.column_names
    others = (
        None,
        loaded.add_column("other", [1] * 3),
        prepared.select([0, 1]),
        prepared.select([1, 0, 2]),
        prepared.remove_columns("input_ids"),
        prepared.to_iterable_dataset(),
    )
    assert all(with_arguments(loaded, other) is loaded for other in others)
    assert with_arguments(prepared, loaded) is prepared


def test_a_row_may_name_one_of_several_templates_and_a_column_of_that_name_is_none(tokenizer):
    several = make_tokenizer()
    several.chat_template = {"default": tokenizer.chat_template, "other": OTHER}
    row = FORMATS["chat"](0)[0]
    named = {**row, "chat_template_kwargs": {"chat_template": "other"}}
    beside = {**row, "chat_template": OTHER}  # TRL does not read it either
    samples = TrainingSamples([named] * 2, several)
    texts = [tokenizer.decode(sample.input_ids) for sample in samples.take(2, 0, None, 99)]
    assert all(text.startswith("[user]") for text in texts) and samples.own_templates == 2
    samples = TrainingSamples([beside] * 2, tokenizer)
    texts = [tokenizer.decode(sample.input_ids) for sample in samples.take(2, 0, None, 99)]
    assert not any(text.startswith("[user]") for text in texts) and not samples.own_templates


def test_a_row_without_a_reply_is_not_put_down_to_a_length(tokenizer):
    """A template that leaves the replies out, and a limit that does."""
    chat = [{"role": "user", "content": "sort"}, {"role": "assistant", "content": "box"}]
    own = [
        {"messages": chat, "chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}}
    ]
    for rows, length, reason in (
        (own, None, "no response"),
        ([{"messages": chat}], 3, "no response within `data.max_length`"),
    ):
        samples = TrainingSamples(rows * 3, tokenizer)
        with pytest.raises(CalibrationDataError):
            samples.take(2, 0, length, 8)
        assert set(samples.skipped) == {reason}
