"""Evaluating a checkpoint or adapter: answers to prompt sets, judged, and utility.

Every answer is kept, so that judges can be run again without the model. A run that was cut off goes
on where it stopped.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.folding import fold_adapters
from ..checkpoints.loading import load_placed, load_tokenizer
from ..checkpoints.locking import alone_in
from ..checkpoints.source import adapter_base
from ..config.validation import check_is
from ..data.prompts import Prompt, check_encoding, kept_apart, load_prompts, prompts_used
from ..distributed.layouts import Sharding, loads_sharded
from ..distributed.processes import leave_processes, this_job
from ..errors import ConfigError, OutputError
from ..judges import Judge, Verdict, load_judge
from ..models.batch_size import BatchSize, Worker, fitting_answers, naming_shortage
from ..models.generation import answers_to_tokens, prompt_tokens
from ..models.parameters import base_model, context_length
from ..models.quantized import kept_packed
from ..models.reasoning import MOSTLY, Reply
from ..models.supported import check_answers
from ..progress import progress_bar, progress_shown
from ..provenance import chat_template_hash, model_reference, sha256_of_json, software_versions
from ..text import strict_json
from .agreement import KINDS, agreement, compared, comparisons
from .config import EvaluationConfig
from .folder import GENERATIONS, RESULT, SETTINGS, VERDICTS
from .records import Records, read_answers, reply_of
from .results import summary
from .utility import check_tasks, measure_utility


logger = logging.getLogger(__name__)
# How an adapter answers, which the settings of a run say, as in 16 bits the answers may differ.
# Earlier versions kept it beside the weights and said nothing of it.
_LORA = "folded into the weights where a merge holds it"
_LORA_SHARDED = "beside the weights"  # what `fold_adapters` leaves of a model that is sharded
__all__ = ["GENERATIONS", "RESULT", "SETTINGS", "VERDICTS", "evaluate"]
_TOO_SMALL = (
    "The evaluation ran out of memory: set a smaller `batch_size`, or share the model out over several devices by "
    "`--accelerate_config zero3`; the answers so far are kept."
)
_EVALUATION = Worker(
    "The evaluation",
    "lower `max_new_tokens`, leave out the longest prompts, or take a device with more memory",
)


def evaluate(config: EvaluationConfig) -> dict[str, Any] | None:
    """Measures refusals, over-refusal and utility of a checkpoint or adapter; goes on with a run
    that was cut off.

    Answers (greedy decoding), verdicts and numbers go to `config.output_dir`. Collective: every
    process of a launch calls it. All of them generate answers. Then they leave the process group:
    judges and utility are the first one's alone.

    Args:
        config: What to evaluate, on what, and how.

    Returns:
        What is in `evaluation.json`; None in every process but the first. `judges` has for each
            judge its `sets` with
        the share (0–1) of every label, `attack_success` (the mean over harmful sets) and
            `over_refusal` (over benign
        ones), each with `low` and `high` of its 95 % interval and its `count`; of several judges, each
            set and mean has their `disagreement`, the share of the answers that all of them judged
            on which they do not decide alike, and `compared` names the judges that are held
            against each other; `agreement` Cohen's κ of every two judges; `utility` the metrics of
            lm-eval's tasks.

    Raises:
        ConfigError: A value is missing or impossible, or a judge or task is not to be had.
        UnsupportedModelError: The model is not to be had.
        CheckpointError: Its weight files are missing or damaged.
        CalibrationDataError: A prompt set is not to be had, or cannot be used.
        OutputError: `config.output_dir` holds another run, is used by one, or cannot be written.
        MemoryShortageError: The device is too small.
        SafeGeneError: A judge failed.
    """
    check_is(config, EvaluationConfig, "evaluate")
    job = this_job()
    with job.naming_rank(), naming_shortage(_TOO_SMALL):
        return _evaluated(config, job)


def _evaluated(config: EvaluationConfig, job: Sharding) -> dict[str, Any] | None:
    folder = Path(config.output_dir)
    with ExitStack() as held:
        with job.raising_together():
            config.check()
            _check_folder(folder, config)
            prompts, repeated = _prompts(config)
            judges = [load_judge(spec) for spec in config.judges] if job.is_main else []
            manager = (
                check_tasks(config.tasks, config.tasks_dir)
                if config.tasks and job.is_main
                else None
            )
            tokenizer = load_tokenizer(config.model_name_or_path, config.model_revision)
            if job.is_main:
                check_encoding(tokenizer, config.model_name_or_path, prompts, config.exclude_data)
                held.enter_context(alone_in(folder, "evaluation"))
        # asked for once, and of a hub's model only after it is here: the weight files are hashed
        records = cache(lambda: Records(folder, _settings(config, tokenizer)))
        model = _answer(config, job, prompts, tokenizer, records)
        leave_processes()
        if not job.is_main:
            return None
        answers = read_answers(folder)
        replies = [reply_of(answers[prompt.key]) for prompt in prompts]
        verdicts = {
            judge.name: records().verdicts(judge, prompts, replies, config.task_labels)
            for judge in judges
        }
        result: dict[str, Any] = {
            "settings": records().settings
            | {"seed": config.seed, "num_prompts": config.num_prompts},
            "prompts": {
                "count": len(prompts),
                "sha256": sha256_of_json([prompt.key for prompt in prompts]),
            },
            "left_out_as_repeated": repeated,
            **_judged(prompts, judges, verdicts, config.seed),
        }
        if manager is not None and model is not None:
            count, samples = config.batch_size, config.num_task_samples
            result["utility"] = measure_utility(
                model, tokenizer, config.tasks, manager, count, samples, config.seed
            )
        _warn_of_unfinished(replies)
        replace_file(folder / RESULT, strict_json(result) + "\n")
    return result


def _judged(
    prompts: Sequence[Prompt],
    judges: Sequence[Judge],
    verdicts: Mapping[str, Sequence[Verdict]],
    seed: int,
) -> dict[str, Any]:
    """What every judge's verdicts come to, and how far the judges agree."""
    sees = {judge.name: judge.sees for judge in judges}
    several = len(sees) > 1
    beside = comparisons(prompts, verdicts, sees) if several else {}
    own = {
        judge.name: {
            "sees": judge.sees,
            **judge.describe(),
            **summary(prompts, verdicts[judge.name], seed, beside.get(judge.name)),
        }
        for judge in judges
    }
    found: dict[str, Any] = {"judges": own, "agreement": agreement(prompts, verdicts, sees)}
    if several:
        found["compared"] = {kind: compared(sees, kind) for kind in KINDS}
    return found


def _warn_of_unfinished(replies: Sequence[Reply]) -> None:
    unfinished = sum(not reply.finished for reply in replies)
    if replies and unfinished >= MOSTLY * len(replies):
        logger.warning(
            "%d of %d answers never left the reasoning, and say nothing of the model: raise `max_reasoning_tokens`, or set "
            "it to 0 to evaluate without reasoning.",
            unfinished,
            len(replies),
        )


def _check_folder(folder: Path, config: EvaluationConfig) -> None:
    """Raises `OutputError` for the folder of a model or of data, which the evaluation's files would
    become a part of.
    """
    name = config.model_name_or_path
    inputs = [
        name,
        adapter_base(name, config.model_revision),
        *config.exclude_data,
        config.tasks_dir,
    ]
    inputs += [*config.harmful_data, *config.benign_data]
    for one in inputs:
        if one and folder.is_dir() and Path(one).is_dir() and folder.samefile(one):
            raise OutputError(
                f"{folder} is read as {one}, and would be written into: choose another `output_dir`."
            )


def _answer(
    config: EvaluationConfig,
    job: Sharding,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    records: Callable[[], Records],
) -> nn.Module | None:
    """Collective: generates the answers that are missing; the model, where it had to be loaded."""
    with job.raising_together():
        answers = read_answers(Path(config.output_dir))
        if job.is_main and answers:
            records().check(answers)
    missing = [prompt for prompt in prompts if prompt.key not in answers]
    if not missing and not config.tasks:
        return None
    model, sharding = load_placed(
        config.model_name_or_path,
        config.model_revision,
        config.dtype,
        job,
        config.allow_pickled_shards,
    )
    if sharding.collective_forward and config.tasks:
        raise ConfigError(
            "Utility tasks need the whole model in one process: launch with `ddp` or without a launcher."
        )
    with job.raising_together():
        fold_adapters(model, sharding)
    with job.raising_together():
        if job.is_main and not answers:
            records().check(answers)
            records().begin()
    for part, replies in generated(model, tokenizer, missing, config, sharding):
        with job.raising_together():
            if job.is_main:
                records().add_answers(part, replies)
    return model


def _prompts(config: EvaluationConfig) -> tuple[list[Prompt], list[dict[str, object]]]:
    prompts: list[Prompt] = []
    for source in config.harmful_data:
        prompts += load_prompts(
            source, "harmful", config.data_split, config.num_prompts, config.seed
        )
    for source in config.benign_data:
        prompts += load_prompts(
            source, "benign", config.data_split, config.num_prompts, config.seed
        )
    names = [*config.harmful_data, *config.benign_data]
    if len({Path(name).stem for name in names}) < len(names):
        raise ConfigError("Two prompt sets have one name: rename one of the files.")
    return kept_apart(prompts, prompts_used(config.exclude_data, config.data_split))


def generated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    sharding: Sharding,
) -> Iterator[tuple[list[Prompt], list[Reply]]]:
    """Answers to a few batches per rank at a time, the longest prompts first: memory that does not
    suffice shows at once.
    """
    check_answers(model)
    answering = config.answering(tokenizer)
    ignored = answering.ignores(config.max_reasoning_tokens, "max_reasoning_tokens")
    if ignored and sharding.is_main:
        logger.warning(ignored)
    messages = [list(prompt.messages) for prompt in prompts]
    tokens = prompt_tokens(tokenizer, messages, answering.style)
    new_tokens = config.max_new_tokens + answering.max_reasoning_tokens
    lengths, context = [len(ids) for ids in tokens], context_length(model)
    with sharding.raising_together():
        short = answering.lacks_room(
            lengths, context, config.max_new_tokens, "max_reasoning_tokens"
        )
    if short and sharding.is_main:
        logger.warning(short)
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    longest = max(lengths, default=0) + new_tokens
    size = BatchSize(
        fitting_answers(config.batch_size, base_model(model), longest, 1, sharding),
        sharding,
        _EVALUATION,
    )
    done = 0
    with kept_packed(model), progress_bar("Answering", len(order), "prompt") as bar:
        while done < len(order):
            part = order[done : done + 4 * size.now * sharding.world_size]
            asked = [tokens[i] for i in part]

            def answers(batch_size: int, asked: list[list[int]] = asked) -> list[str]:
                return answers_to_tokens(model, tokenizer, asked, new_tokens, batch_size, sharding)

            with progress_shown(False):  # one bar for all parts
                texts = sharding.gather_texts(size.put_through(answers))
            done += len(part)
            bar.update(len(part))
            logger.info("%d of %d answers", done, len(order))
            yield [prompts[i] for i in part], [answering.read(text) for text in texts]


def _settings(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    name, revision = config.model_name_or_path, config.model_revision
    base = adapter_base(name, revision)
    try:
        model, base_model = (
            model_reference(name, revision),
            None if base is None else model_reference(base),
        )
    except OSError as error:
        raise ConfigError(
            f"The files of {name} cannot be read, to tell its answers from another model's: {error}"
        ) from error
    return {
        "model": model,
        "base_model": base_model,
        **({} if base is None else {"lora": _LORA_SHARDED if loads_sharded() else _LORA}),
        **config.deciding_answers,
        **config.answering(tokenizer).record,
        "chat_template": chat_template_hash(tokenizer),
        "software": software_versions(),
    }
