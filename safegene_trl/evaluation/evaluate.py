"""Evaluating a checkpoint or adapter: answers to prompt sets, judged, and utility.

Every answer is kept, so that judges can be run again without the model. A run that was cut off goes on where it stopped.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calibration import prompt_text
from ..errors import ConfigError, OutputError
from ..loading import adapter_base, load_placed, load_tokenizer
from ..output import writing
from ..provenance import chat_template_hash, model_reference, sha256_of_json, software_versions
from ..sharding import Sharding, leave_processes
from ..validation import DTYPES, LARGEST_COUNT, Rule, check_values
from .generation import generate_answers
from .judges import Exchange, Judge, Verdict, judged, load_judge
from .prompts import Prompt, kept_apart, load_prompts, prompts_used
from .results import agreement, summary
from .utility import check_tasks, measure_utility


logger = logging.getLogger(__name__)
GENERATIONS, VERDICTS, RESULT, SETTINGS = "generations.jsonl", "verdicts.jsonl", "evaluation.json", "settings.json"


@dataclass
class EvaluationConfig:
    """What to evaluate, on what, and how.

    Args:
        model_name_or_path: Checkpoint or LoRA adapter: directory or hub id.
        model_revision: Its branch, tag or commit on the hub.
        dtype: Data type to load it in.
        allow_pickled_shards: Read a `checkpoint-N` that holds nothing but DeepSpeed's shards. They are pickle files, which can
            run code: only for files of your own.
        harmful_data: Prompt sets that ought to be refused: local files or hub ids (`ID:CONFIG@SPLIT` where a data set has several)
            with a column `prompt` (or `messages`) and perhaps `category`.
        benign_data: Prompt sets that ought to be answered, look-alikes above all.
        data_split: Split of the hub's data sets that name none.
        exclude_data: Data sets, or safety vectors, whose prompts the model or its vector was made with: prompts that repeat one
            of them, wholly or nearly, are left out and listed.
        num_prompts: Prompts drawn from each set. Default: all.
        judges: Judges, see `safegene_trl.evaluation.judges.load_judge`. The first one's numbers are printed.
        task_labels: A classifier's labels: an answer that is nothing but one of them is off-task.
        tasks: Utility: tasks of lm-eval.
        tasks_dir: Folder with task files of your own.
        num_task_samples: Samples of each utility task. Default: all.
        max_new_tokens: Tokens generated for an answer.
        batch_size: Prompts per forward pass.
        seed: For drawing prompts.
        output_dir: Where answers, verdicts and results go. What is there of the same run is used again.
    """

    model_name_or_path: str = field(default="", metadata={"help": "Checkpoint or adapter: directory or hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(default="auto", metadata={"help": "Data type to load it in, e.g. float32."})
    allow_pickled_shards: bool = field(
        default=False, metadata={"help": "Read DeepSpeed's shards, pickle files that can run code: only your own."}
    )
    harmful_data: list[str] = field(default_factory=list, metadata={"help": "Prompt sets that ought to be refused."})
    benign_data: list[str] = field(default_factory=list, metadata={"help": "Prompt sets that ought to be answered."})
    data_split: str = field(default="train", metadata={"help": "Split of data sets on the hub that name none."})
    exclude_data: list[str] = field(
        default_factory=list, metadata={"help": "Data or vectors whose prompts must not be repeated."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Prompts of each set (default: all)."})
    judges: list[str] = field(default_factory=lambda: ["refusal_phrases"], metadata={"help": "Judges."})
    task_labels: list[str] = field(default_factory=list, metadata={"help": "Labels that are off-task as answers."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Utility tasks of lm-eval."})
    tasks_dir: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    num_task_samples: int | None = field(default=None, metadata={"help": "Samples of each task (default: all)."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated for an answer."})
    batch_size: int = field(default=8, metadata={"help": "Prompts per forward pass."})
    seed: int = field(default=0, metadata={"help": "For drawing prompts."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where everything goes."})

    RULES: ClassVar[Mapping[str, Rule]] = {
        "dtype": Rule(choices=DTYPES),
        "num_prompts": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "tasks_dir": Rule(may_be_null=True),
        "num_task_samples": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "max_new_tokens": Rule(at_least=1, at_most=LARGEST_COUNT),
        "batch_size": Rule(at_least=1, at_most=LARGEST_COUNT),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
    }

    def check(self) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        if not self.model_name_or_path:
            raise ConfigError("No model is named: set `model_name_or_path` to a checkpoint or adapter.")
        if not (self.harmful_data or self.benign_data or self.tasks):
            raise ConfigError("There is nothing to evaluate on: set `harmful_data`, `benign_data` or `tasks`.")
        if not self.judges:
            raise ConfigError("No judge is named: set `judges`, e.g. to `refusal_phrases`.")
        check_values(self)

    @property
    def deciding_answers(self) -> dict[str, Any]:
        """The settings that an answer depends on."""
        return {"max_new_tokens": self.max_new_tokens, "decoding": "greedy", "padding": "left", "dtype": self.dtype}


def evaluate(config: EvaluationConfig, job: Sharding) -> dict[str, Any] | None:
    """Runs the evaluation, or what is left of it. Collective; leaves the process group.

    Answers are generated by all ranks. Judges and utility are rank 0's alone, after the others have left.

    Returns:
        What is in `evaluation.json`, on rank 0; None elsewhere.

    Raises:
        SafeGeneError: Model, data, judges or tasks are not to be had, or `output_dir` holds another run.
    """
    folder = Path(config.output_dir)
    with job.agreed():
        config.check()
        prompts, repeated = _prompts(config)
        judges = [load_judge(spec) for spec in config.judges] if job.is_main else []
        manager = check_tasks(config.tasks, config.tasks_dir) if config.tasks and job.is_main else None
        tokenizer = load_tokenizer(config.model_name_or_path, config.model_revision)
        if job.is_main:
            with writing():
                folder.mkdir(parents=True, exist_ok=True)
    answers = _read(folder / GENERATIONS)
    missing = [prompt for prompt in prompts if prompt.key not in answers]
    model = sharding = None
    # asked for once, and of a hub's model only after it is here: the weight files are hashed
    settings = cache(partial(_settings, config, tokenizer))
    with job.agreed():
        if job.is_main and answers:
            _check_settings(folder, settings())
    if missing or config.tasks:
        model, sharding = load_placed(
            config.model_name_or_path, config.model_revision, config.dtype, job, config.allow_pickled_shards
        )
        if sharding.collective_forward and config.tasks:
            raise ConfigError(
                "Utility tasks need the whole model in one process: launch with `ddp` or without a launcher."
            )
        with job.agreed():
            if job.is_main and not answers:
                with writing():
                    (folder / SETTINGS).write_text(json.dumps(settings(), indent=2) + "\n", encoding="utf-8")
        for rows in _generated(model, tokenizer, missing, config, sharding):
            if job.is_main:
                _append(folder / GENERATIONS, rows)
    leave_processes()
    if not job.is_main:
        return None
    answers = _read(folder / GENERATIONS)
    texts = [answers[prompt.key]["answer"] for prompt in prompts]
    verdicts = {judge.name: _verdicts(folder, judge, prompts, texts, config.task_labels) for judge in judges}
    result: dict[str, Any] = {
        "settings": settings() | {"seed": config.seed, "num_prompts": config.num_prompts},
        "prompts": {"count": len(prompts), "sha256": sha256_of_json([prompt.key for prompt in prompts])},
        "left_out_as_repeated": repeated,
        "judges": {
            judge.name: {"sees": judge.sees, **judge.describe(), **summary(prompts, verdicts[judge.name], config.seed)}
            for judge in judges
        },
        "agreement": agreement(verdicts),
    }
    if manager is not None and model is not None:
        count, samples = config.batch_size, config.num_task_samples
        result["utility"] = measure_utility(model, tokenizer, config.tasks, manager, count, samples, config.seed)
    with writing():
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _prompts(config: EvaluationConfig) -> tuple[list[Prompt], list[dict[str, object]]]:
    prompts: list[Prompt] = []
    for source in config.harmful_data:
        prompts += load_prompts(source, "harmful", config.data_split, config.num_prompts, config.seed)
    for source in config.benign_data:
        prompts += load_prompts(source, "benign", config.data_split, config.num_prompts, config.seed)
    names = [*config.harmful_data, *config.benign_data]
    if len({Path(name).stem for name in names}) < len(names):
        raise ConfigError("Two prompt sets have one name: rename one of the files.")
    return kept_apart(prompts, prompts_used(config.exclude_data, config.data_split))


def _generated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    sharding: Sharding,
) -> Iterable[list[dict[str, Any]]]:
    """Answers to a few batches per rank at a time, the longest prompts first: memory that does not suffice shows at once."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt_text(tokenizer, list(prompt.messages))))
    size = 4 * config.batch_size * sharding.world_size
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        messages = [list(prompt.messages) for prompt in part]
        own = generate_answers(model, tokenizer, messages, config.max_new_tokens, config.batch_size, sharding)
        answers = sharding.united(own)
        logger.info("%d of %d answers", start + len(part), len(ordered))
        yield [
            {"key": prompt.key, **asdict(prompt), "answer": answer}
            for prompt, answer in zip(part, answers, strict=True)
        ]


def _verdicts(
    folder: Path, judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str], labels: Sequence[str]
) -> list[Verdict]:
    """What the judge said before, and its verdicts on the rest; kept as they come."""
    about = sha256_of_json([judge.describe(), sorted(labels)])[:16]
    known = {
        row["key"]: Verdict(row["label"], row["score"])
        for row in _rows(folder / VERDICTS)
        if row["judge"] == judge.name and row["about"] == about
    }
    rest = [i for i, prompt in enumerate(prompts) if prompt.key not in known]
    for start in range(0, len(rest), 64):
        part = rest[start : start + 64]
        exchanges = [Exchange(prompts[i].text, answers[i], tuple(labels)) for i in part]
        found = {prompts[i].key: verdict for i, verdict in zip(part, judged(judge, exchanges), strict=True)}
        _append(
            folder / VERDICTS,
            [{"key": key, "judge": judge.name, "about": about, **asdict(v)} for key, v in found.items()],
        )
        known |= found
    return [known[prompt.key] for prompt in prompts]


def _settings(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    name, revision = config.model_name_or_path, config.model_revision
    base = adapter_base(name, revision)
    return {
        "model": model_reference(name, revision),
        "base_model": None if base is None else model_reference(base),
        **config.deciding_answers,
        "chat_template": chat_template_hash(tokenizer),
        "software": software_versions(),
    }


def _check_settings(folder: Path, now: dict[str, Any]) -> None:
    try:
        earlier = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} holds answers without their settings: choose another `output_dir`.") from error
    other = [key for key, value in now.items() if key != "software" and earlier.get(key) != value]
    if other:
        raise OutputError(
            f"{folder} holds answers of a run with another `{other[0]}`: choose another `output_dir`, or delete that folder."
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with writing(), open(path, "a", encoding="utf-8") as file:
        if file.tell() and not _ends_with_newline(path):
            file.write("\n")
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
