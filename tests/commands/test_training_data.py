"""Training data that the trainer cannot read is named before the model is loaded."""

import json
import re

import pytest
from datasets import IterableDataset
from trl import SFTConfig

from safegene_trl.commands import sft
from safegene_trl.commands.main import main
from safegene_trl.commands.training_data import check_rows
from safegene_trl.errors import CalibrationDataError, UnsupportedModelError

from ..conftest import CHAT_TEMPLATE, make_tokenizer


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.fixture
def run(model_dir, tmp_path, monkeypatch, capsys):
    """Runs `safegene sft` on rows, up to where the trainer is made; gives the exit code and what
    was said last.
    """

    class Made(Exception):
        """The trainer would load the model now."""

    def made(*args, **kwargs):
        raise Made

    monkeypatch.setattr(sft, "SFTTrainer", made)

    def result(rows, *words, data=tmp_path / "data"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "train.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        options = ["--model_name_or_path", str(model_dir), "--dataset_name", str(data)]
        options += [
            "--output_dir",
            str(tmp_path / "out"),
            "--use_cpu=true",
            "--bf16=false",
            "--report_to=none",
        ]
        code = main(["sft", *options, *words])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists()
        return ("made" if "(Made" in said else code), said

    return result


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"question": "a", "answer": "b"}, [], "no column `text`, only `question`, `answer`, and"),
        (
            {"text": "a"},
            ["--dataset_text_field=body"],
            "no column `body`, only `text`, and `dataset_text_field` is",
        ),
        ({"prompt": "a", "response": "b"}, [], "no column `completion`, only `prompt`, `response`"),
        (
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
            [],
            "no column `completion`",
        ),
        ({"conversations": CHAT}, [], "no column `text`, only `conversations`"),
        ({"text": 3}, [], "`text` in the first row of the training data is no text but int"),
        (
            {"prompt": "a", "completion": None},
            [],
            "`completion` in the first row of the training data is no text",
        ),
        ({"messages": []}, [], "a conversation without turns"),
        (
            {"text": "a"},
            ["--dataset_train_split=rain"],
            "no split `rain`: set `dataset_train_split` to one of train",
        ),
        (
            {"text": "a"},
            ["--eval_strategy=epoch"],
            "no split `test`: set `dataset_test_split` to one of train",
        ),
    ],
)
def test_a_column_that_the_trainer_lacks_is_named(row, words, message, run):
    code, said = run([row] * 3, *words)
    assert code == 2 and message in said


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, []),
        ({"body": "a"}, ["--dataset_text_field=body"]),
        ({"prompt": "a", "completion": "b"}, ["--dataset_text_field=body"]),
        ({"messages": CHAT}, []),
        ({"conversations": SHAREGPT}, []),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, []),
        ({"input_ids": [5, 6, 7]}, []),
        pytest.param(
            {"anything": "a"},
            ["--dataset_kwargs", '{"skip_prepare_dataset": true}'],
            marks=pytest.mark.skipif(
                "dataset_kwargs" not in SFTConfig._VALID_DICT_FIELDS,
                reason="TRL 1.9 takes `dataset_kwargs` in a recipe only",
            ),
        ),
    ],
)
def test_what_the_trainer_can_read_reaches_it(row, words, run):
    assert run([row] * 3, *words)[0] == "made"


def test_a_recipe_whose_rows_are_prepared_reaches_it(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_kwargs: {skip_prepare_dataset: true}\n")
    assert run([{"anything": "a"}] * 3, "--config", str(tmp_path / "recipe.yaml"))[0] == "made"


@pytest.mark.parametrize(
    "row",
    [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}, {"conversations": SHAREGPT}],
)
def test_conversations_need_a_chat_template(row, run, model_dir, tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    (model_dir / "chat_template.jinja").unlink()
    bare.save_pretrained(model_dir)
    code, said = run([row] * 3)
    assert (
        code == 2
        and f"the tokenizer of {model_dir} has no chat template" in said
        and "set `chat_template" in said
    )
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    assert run([row] * 3, f"--chat_template_path={tmp_path / 'chat.jinja'}")[0] == "made"
    assert run([{"text": "a"}] * 3)[0] == "made"
    # arguments that are no mapping name no template
    code, said = run([{**row, "chat_template_kwargs": '{"a": 1}'}] * 3)
    assert code == 2 and f"the tokenizer of {model_dir} has no chat template" in said


def test_a_missing_or_unreadable_mixture_is_named(model_dir, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model_dir}\ndatasets: [{{path: json, data_files: {tmp_path / 'none.jsonl'}}}]\n"
    )
    assert (
        main(
            [
                "sft",
                "--config",
                str(recipe),
                "--output_dir",
                str(tmp_path / "out"),
                "--use_cpu=true",
            ]
        )
        == 2
    )
    assert "The data set json cannot be read: Unable to find" in capsys.readouterr().err


def test_streams_without_columns_or_rows(model_dir):
    def check(rows):
        check_rows(
            IterableDataset.from_generator(lambda: iter(rows)),
            "stream",
            SFTConfig(bf16=False),
            "m",
            None,
        )

    check([{"text": "a"}])
    with pytest.raises(CalibrationDataError, match="The stream has no rows"):
        check([])
    with pytest.raises(UnsupportedModelError, match="is not there"):
        check_rows(
            [{"messages": CHAT}],
            "data",
            SFTConfig(bf16=False),
            str(model_dir / "none" / "here"),
            None,
        )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "{data}/train.jsonl",
            "is a file, {data}/train.jsonl, .*path: json, data_files: {data}/tr",
        ),
        ("{data}/table.csv", "is a file, {data}/table.csv, .*path: csv, data_files: {data}/table"),
        ("json", "is a format of files, json, .*path: json, data_files: FILE.jsonl"),
    ],
)
def test_a_file_or_a_format_is_no_data_set(name, said, run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "table.csv").write_text("text\na\n")
    code, printed = run([{"text": "a"}], data=name.format(data=folder))
    assert code == 2 and re.search(said.format(data=folder), printed)


def test_what_led_to_a_failure_of_datasets_is_said(run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text("{no")
    code, printed = run([], data=tmp_path / "broken")
    assert code == 2 and "generating the dataset: JSON parse error" in printed


def test_cells_between_tabs_are_refused(run, tmp_path):
    (tmp_path / "faq.tsv").write_text("prompt\tcompletion\na\tb\n")
    code, said = run([], data=tmp_path / "faq.tsv")
    assert code == 2 and "a training reads no cells between tabs: save it as JSON lines" in said
