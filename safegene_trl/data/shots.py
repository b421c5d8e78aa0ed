"""The shots of one recalibration: drawn, tokenised and split, from what the user names or what
comes with the vector.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from datasets import IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from ..config.data import DataConfig
from ..config.settings import SafeGeneConfig
from ..errors import CalibrationDataError
from ..models.inputs import Sample, SoftTargets, shortened
from ..models.reasoning import PromptStyle, split_stored
from ..provenance import sha256_of_json
from ..vectors.prompt_rows import rows_of, verdict_of
from ..vectors.safety_vector import SafetyVector
from .calibration import CalibrationSet, Split, check_context, split_samples
from .prompt_style import StepPrompts
from .rows import Row, Skipped, UnreadableRowError, conversation, drawn, prompt_of
from .sources import load_rows
from .training_samples import TrainingSamples, templated
from .unseen import GatePrompts, Unseen, skips


NO_TARGETS = "no soft targets that are those of their refusals in the prompts here"
BEYOND = "tokens that the fine-tune's vocabulary lacks"
NO_ROOM = "prompts that leave `data.max_length` no room for the refusal"
BEYOND_CONTEXT = "prompts that the model's context has no room for"
NO_RESPONSE = "no response"
TaskRows: TypeAlias = Sequence[Row] | IterableDataset | TorchDataset[Any]


@dataclass(frozen=True)
class Shots:
    """Samples for the losses, further ones to measure on, a record for the report, and what is
    right but surprising.
    """

    data: CalibrationSet
    unseen: Unseen
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


def gather_shots(
    config: SafeGeneConfig,
    vector: SafetyVector,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    task_rows: TaskRows | None,
    packed: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> Shots:
    """Draws harmful, benign, border and task shots.

    Args:
        config: How many, and from where.
        vector: Brings harmful prompts with refusals and benign prompts with answers, and perhaps
            benign ones that the aligned model refuses.
        tokenizer: The model's.
        context: The model's context length in tokens, None if it has no limit.
        task_rows: The training set, used where `config.data.task_data` names no other: as the
            trainer holds it, or raw.
        packed: Whether its rows hold several samples without saying where each begins; None where
            that is not known.
        template_options: Arguments for the chat template that the training uses, as far as they
            are known.

    Raises:
        ConfigError: Targets in the reasoning are asked for, and the template has none; it never
            reads an argument that is named; or the context has no room for the reasoning.
        CalibrationDataError: Data is missing, empty, cannot be read or is too long for the model.
    """
    extra = config.measure.num_test_prompts
    written = StepPrompts.of(config, vector, tokenizer, template_options or {})
    read = partial(_readable, tokenizer=tokenizer, style=written.target)
    harmful, harmful_source = _safety_data(config, vector, read)
    check_context(harmful.samples, context, harmful.what)
    harmful_split, harmful_left = _divided(harmful, context, config.data.num_safety_shots, config)
    benign, benign_split, benign_left = _benign_shots(config, vector, read, context)
    border_split, border_record = _border_shots(config, vector, read, context)
    training, task_source = _training_samples(
        config, tokenizer, task_rows, packed, written.target.options
    )
    task = training.take(
        config.data.num_task_shots + extra,
        config.seed,
        config.data.max_length,
        config.data.max_response_tokens,
    )
    check_context(task, context, "task data")
    task_split = split_samples(
        task[: config.data.num_task_shots], config.data.holdout_share, "task data", training.skipped
    )
    gate = GatePrompts(config, vector, tokenizer, context, written.answering)
    learned: list[Row] = rows_of(vector.prompts, "harmful", "benign", "border")
    used = [*harmful.rows, *learned]
    harmful_prompts = gate.of("harmful", used, harmful_left)
    benign_prompts = gate.of("benign", used, benign_left)
    unseen = Unseen(
        {"harmful": harmful_prompts, "benign": benign_prompts},
        task[len(task_split.fit) :][:extra],
        written.answering,
        gate.verdicts,
        frozenset(gate.from_vector),
    )
    record = {
        "safety": _record(harmful_source, harmful_split, harmful.skipped)
        | _soft_record(harmful_split),
        "task": {
            **_record(task_source, task_split, training.skipped),
            "read_by": dict(training.read_by),
        },
        "benign": benign_split
        and _record("vector", benign_split, benign.skipped) | _soft_record(benign_split),
        **border_record,
        "unseen": gate.record(unseen, harmful_source, task_source),
        **written.record,
    }
    data = CalibrationSet(harmful_split, task_split, benign_split, border_split)
    warnings = (
        *written.warnings,
        *gate.warnings,
        *_skip_warnings(record),
        *_template_warnings(training, len(task)),
        *_target_warnings(harmful.unlike + benign.unlike),
        *_length_warnings(config, harmful.samples + benign.samples),
    )
    return Shots(data, unseen, record, warnings)


def within_vocabulary(shots: Shots, rows: int) -> Shots:
    """The shots without soft targets for tokens beyond a model's vocabulary of so many: the aligned
    model's may have been padded, and a fine-tune's cut to its tokenizer's.
    """

    def of(split: Split) -> Split:
        parts = (split.fit, split.held_out)
        return Split(*([_within(sample, rows) for sample in part] for part in parts))

    benign = shots.data.benign and of(shots.data.benign)
    border = shots.data.border and of(shots.data.border)
    data = replace(shots.data, harmful=of(shots.data.harmful), benign=benign, border=border)
    before, now = (_with_targets(each) for each in (shots.data, data))
    if before == now:
        return shots
    record = dict(shots.record)
    for name, split in (("safety", data.harmful), ("benign", data.benign)):
        if split is not None:
            record[name] = record[name] | _soft_record(split)
    if border is not None:  # which are nothing without them
        kept = Split(*([s for s in part if s.soft] for part in (border.fit, border.held_out)))
        skipped = Skipped(record["border"].get("skipped", {}))
        if lost := len(border.samples) - len(kept.samples):
            skipped[BEYOND] = lost
        record["border"] = _record("vector", kept, skipped) | _soft_record(kept)
        data = replace(data, border=kept if kept.samples else None)
    warning = (
        f"The aligned model finds tokens likely in {before - now} answers of the safety vector which the fine-tune's vocabulary of "
        f"{rows} tokens lacks: of these only the words are taught, and benign prompts that it refuses are left out."
    )
    return replace(shots, data=data, record=record, warnings=(*shots.warnings, warning))


def _within(sample: Sample, rows: int) -> Sample:
    beyond = sample.soft is not None and max(map(max, sample.soft.ids)) >= rows
    return replace(sample, soft=None) if beyond else sample


def _with_targets(data: CalibrationSet) -> int:
    return sum(sample.soft is not None for sample in data.samples)


@dataclass(frozen=True)
class _Read:
    """Rows with a prompt and a response, the sample of each, and what was left out; `unlike`: how many
    have soft targets for other tokens than the sample's.
    """

    what: str
    rows: list[Row]
    samples: list[Sample]
    skipped: Skipped
    unlike: int = 0


def _safety_data(
    config: SafeGeneConfig, vector: SafetyVector, read: Callable[..., _Read]
) -> tuple[_Read, str]:
    """Harmful prompts with refusals: the user's own, or the vector's. A prompt without refusal gets
    one of the vector's. `read` is `_readable` with the tokenizer and the style.
    """
    count = config.data.num_safety_shots + config.measure.num_test_prompts
    shipped: list[Row] = rows_of(vector.prompts, "harmful")
    if config.data.safety_data is None:
        if not shipped:
            raise CalibrationDataError(
                "The safety vector comes without harmful prompts: set `data.safety_data`."
            )
        return read(drawn(shipped, count, config.seed), count, "safety data"), "vector"
    rows = drawn(
        load_rows(config.data.safety_data, config.data.safety_data_split), count, config.seed
    )
    refusals = [row["response"] for row in shipped]
    found = read(rows, count, "safety data", refusals, from_vector=False)
    if not found.rows and set(found.skipped) == {NO_RESPONSE}:
        raise CalibrationDataError(
            f"{config.data.safety_data} has prompts without refusals: add a column `response`."
        )
    return found, config.data.safety_data


def _benign_shots(
    config: SafeGeneConfig,
    vector: SafetyVector,
    read: Callable[..., _Read],
    context: int | None,
) -> tuple[_Read, Split | None, list[Row]]:
    """Benign prompts with the aligned model's answers: all that were read, the shots among them, of
    which there are none where there are too few, and those that nothing will be fitted on.
    """
    shipped: list[Row] = rows_of(vector.prompts, "benign")
    wanted = config.data.num_benign_shots
    count = wanted + config.measure.num_test_prompts
    found = read(drawn(shipped, count, config.seed), count, "benign prompts")
    check_context(found.samples, context, found.what)
    if min(len(found.rows), wanted) < 2:
        return found, None, _unlike(found.rows, [])
    return found, *_divided(found, config.data.max_length, wanted, config)


def _border_shots(
    config: SafeGeneConfig,
    vector: SafetyVector,
    read: Callable[..., _Read],
    context: int | None,
) -> tuple[Split | None, dict[str, Any]]:
    """Benign prompts that the aligned model refuses, held to what it finds likely there and never to
    the words of its refusal, which would push past it; and their record. Nothing where there are
    none, or none are wanted.
    """
    shipped: list[Row] = rows_of(vector.prompts, "border")
    wanted = config.data.num_border_shots
    if not shipped or not wanted:
        return None, {}
    found = read(drawn(shipped, wanted, config.seed), len(shipped), "border prompts")
    cut = [
        shortened(sample, config.data.max_length, config.data.max_refusal_tokens)
        for sample in found.samples
        if sample.soft is not None
    ]
    left = [sample for sample in cut if sample is not None]
    usable = [s for s in left if context is None or len(s.input_ids) <= context]
    for reason, count in (
        (NO_TARGETS, len(found.samples) - len(cut)),
        (NO_ROOM, len(cut) - len(left)),
        (BEYOND_CONTEXT, len(left) - len(usable)),
    ):
        if count:
            found.skipped[reason] = count
    chosen = usable[:wanted]
    split = (
        split_samples(chosen, config.data.holdout_share, found.what)
        if len(chosen) > 1
        else Split(chosen, [])
    )
    return split if chosen else None, {
        "border": _record("vector", split, found.skipped) | _soft_record(split)
    }


def _readable(
    rows: Iterable[Row],
    count: int,
    what: str,
    responses: Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    from_vector: bool = True,
) -> _Read:
    """The first `count` rows that can be read; those without a response get one of `responses` in
    turn. Those of a vector may have soft targets.
    """
    found: list[Row] = []
    samples: list[Sample] = []
    skipped, unlike = Skipped(), 0
    for row in rows:
        if len(found) == count:
            break
        try:
            messages, response = prompt_of(row), conversation(row)[1]
            if not response and not responses:
                raise UnreadableRowError(NO_RESPONSE)
            response = response or responses[len(found) % len(responses)]
            if style.start == "template":  # what a vector's refusal was checked by
                response = split_stored(response).answer
            sample = templated(tokenizer, messages, response, style)
        except UnreadableRowError as error:
            skipped.add(error)
            continue
        verdict = verdict_of(row) if from_vector else None
        category = row.get("category")
        found.append(
            {"prompt": messages, "response": response, "category": category, "verdict": verdict}
        )
        soft = SoftTargets(**row["targets"]) if from_vector and "targets" in row else None
        fits = soft is not None and sample.response[: len(soft.tokens)] == soft.tokens
        unlike += soft is not None and not fits
        samples.append(replace(sample, soft=soft) if fits else sample)
    return _Read(what, found, samples, skipped, unlike)


def _divided(
    read: _Read, max_length: int | None, count: int, config: SafeGeneConfig
) -> tuple[Split, list[Row]]:
    """The first `count` samples with a response left as shots, and the rows whose prompts nothing
    will be fitted on, each once.
    """
    cut = [shortened(sample, max_length, config.data.max_refusal_tokens) for sample in read.samples]
    usable = [(row, sample) for row, sample in zip(read.rows, cut, strict=True) if sample]
    split = split_samples(
        [sample for _, sample in usable[:count]], config.data.holdout_share, read.what, read.skipped
    )
    rows = [row for row, _ in usable]
    return split, _unlike(rows[len(split.fit) :], rows[: len(split.fit)])


def _unlike(rows: Sequence[Row], fitted: Sequence[Row]) -> list[Row]:
    """Rows with other prompts than those that are fitted on, of each prompt the first."""
    seen = [row["prompt"] for row in fitted]
    found: list[Row] = []
    for row in rows:
        if row["prompt"] not in seen:
            found.append(row)
            seen.append(row["prompt"])
    return found


def _training_samples(
    config: SafeGeneConfig,
    tokenizer: PreTrainedTokenizerBase,
    task_rows: TaskRows | None,
    packed: bool | None,
    options: Mapping[str, Any],
) -> tuple[TrainingSamples, str]:
    if source := config.data.task_data:
        rows = load_rows(source, config.data.task_data_split)
        named = f"task data {source}"
        return TrainingSamples(rows, tokenizer, named, template_options=options), source
    if task_rows is None:
        raise CalibrationDataError(
            "There is no training set to draw task samples from: set `data.task_data`."
        )
    return TrainingSamples(
        task_rows, tokenizer, packed=packed, template_options=options
    ), "training set"


def _skip_warnings(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind of shots of which rows were skipped."""
    found = []
    for kind in ("safety", "task", "border"):
        if kind not in record:
            continue
        source, skipped = record[kind]["source"], record[kind].get("skipped", {})
        if skipped:
            reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
            found.append(
                f"{sum(skipped.values())} rows of the {_named(source)} were skipped: {reasons}."
            )
    return found


def _template_warnings(training: TrainingSamples, count: int) -> list[str]:
    """A sentence where task samples are written with another chat template than all prompts, and
    where they name what a template never reads.
    """
    found = [
        f"{number} rows of the task data have {unread} in `chat_template_kwargs`: it changes nothing in them."
        for unread, number in training.unread.items()
    ]
    if training.own_templates:
        found.append(
            f"{training.own_templates} of {count} task samples are written with a chat template that their rows bring along "
            "(`chat_template` in `chat_template_kwargs`), as the trainer writes them; the prompts that refusals are taught and "
            "measured in are written with the tokenizer's own: where you will serve with another, set that one as the tokenizer's."
        )
    return found


def _target_warnings(unlike: int) -> list[str]:
    """A sentence where soft targets cannot be used, of so many answers."""
    if not unlike:
        return []
    return [
        f"{unlike} answers of the safety vector begin with other tokens in the prompts here than in those that it was made with: "
        "of these only the words are taught, not what the aligned model finds likely beside them."
    ]


def _length_warnings(config: SafeGeneConfig, samples: Sequence[Sample]) -> list[str]:
    """A sentence where more tokens of the answers are asked for than have soft targets."""
    known = max((len(sample.soft.tokens) for sample in samples if sample.soft), default=0)
    wanted = config.data.max_refusal_tokens
    if not known or wanted <= max(known, DataConfig.max_refusal_tokens):
        return []
    return [
        f"`data.max_refusal_tokens` is {wanted}, and the safety vector tells what the aligned model finds likely in the first "
        f"{known} tokens of its answers: no more than those are taught."
    ]


def _named(source: str) -> str:
    """What a sentence calls a source: the training set, the vector, or a data set by its name."""
    return source if source in ("training set", "vector") else f"data set {source}"


def _record(source: str, split: Split, skipped: Skipped) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": sha256_of_json([sample.input_ids for sample in split.samples]),
        "fit": len(split.fit),
        "held_out": len(split.held_out),
        **skips(skipped),
    }


def _soft_record(split: Split) -> dict[str, int]:
    """How many shots are held to the aligned model's own distribution; the others, to its words."""
    return {"soft_targets": sum(s.soft is not None for s in split.samples)}
