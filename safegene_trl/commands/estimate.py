"""`safegene estimate COMMAND …`: what `safegene COMMAND …` will take, for each of its steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl import get_peft_config

from ..auditing.asking import look_at_models
from ..auditing.config import AuditConfig
from ..auditing.plan import plan_audit
from ..checkpoints.live_merge import checkpoint_bytes
from ..checkpoints.loading import load_processor, load_tokenizer, resolve_dtype
from ..checkpoints.skeleton import load_skeleton
from ..checkpoints.source import adapter_base
from ..checkpoints.stored_model import StoredModel
from ..config.search import INTERFERENCE
from ..config.settings import SafeGeneConfig
from ..config.validation import Rule, check_value, nearest
from ..data.prompt_style import trained_options
from ..data.shots import gather_shots
from ..errors import ConfigError
from ..estimation.audit import estimate_audit
from ..estimation.cost import Cost, Launch
from ..estimation.extraction import (
    DifferingModules,
    estimate_extraction,
    estimate_retargeting,
)
from ..estimation.probe import Probe
from ..estimation.safeguard import estimate_safeguard
from ..estimation.stored_merge import estimate_stored_merge
from ..estimation.transport import Side, estimate_transport
from ..extraction.config import ExtractionConfig
from ..extraction.difference import differ_by_adapters
from ..extraction.methods import METHODS
from ..extraction.prompts import ExtractionPrompts
from ..extraction.retargeting import KnownVector, check_aligned
from ..extraction.transport.anchors import read_anchors
from ..extraction.transport.sides import Texts, check_other_family, read_source_vector
from ..step.apply import apply, check_arguments, output_of
from ..step.apply_with_coefficients import check_measures_nothing
from ..step.plan import FINE_TUNE, InputModel, Origin, read_vector, try_output
from ..step.preparation import first_coefficients
from ..step.repair import check_repair
from . import sft
from .apply_arguments import ARGUMENTS as APPLY_ARGUMENTS
from .apply_arguments import ApplyArguments
from .audit import named_vector
from .launch_option import OPTION, take_config, wants_launch
from .output import MEANINGS, give
from .parsing import parse
from .plain_parser import PlainParser
from .training_data import split_of, training_data
from .yaml_files import read_yaml


_MEANING = (
    "Says how many seconds, how much memory and how much disk a command will take, step by step. "
    "Trains and keeps nothing: copies of the model with few layers and random weights are timed, and "
    "the rest is reckoned from them."
)


_FACTORS = (
    "The vector's factors will be {place}: {mib} MiB of {allowed_mib} MiB that they may take now."
)


def main(argv: Sequence[str]) -> int:
    """Prints a table."""
    parser = PlainParser(prog="safegene estimate", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", type=int)
    own, rest = parser.parse_known_args(parser.with_underscores(argv))
    command = rest[0] if rest else ""
    usage = (
        f"`safegene estimate` is followed by {', '.join(_ESTIMATES)} and that command's own options, with "
        f"`{OPTION} NAME --num_processes N` for more than one process."
    )
    if command in ("-h", "--help"):
        told = "\n".join(f"  {name:<11}{meaning}" for name, meaning in MEANINGS.items())
        print(f"{_MEANING}\n\n{usage}\n\n{told}")
        return 0
    if command.startswith("-"):
        options = ["--num_processes", OPTION, *MEANINGS]
        raise ConfigError(f"There is no option `{command}`{nearest(command, options, 0.0)} {usage}")
    if command not in _ESTIMATES:
        said = f"`{command}` cannot be estimated{nearest(command, _ESTIMATES)} " if command else ""
        raise ConfigError(said + usage)
    if own.num_processes is not None and own.num_processes < 1:
        raise ConfigError(f"`--num_processes` is {own.num_processes}: it must be at least 1.")
    launch, rest = _launch(rest[1:], own.num_processes)
    costs = _ESTIMATES[command](rest, launch)
    give({name: vars(cost) for name, cost in costs.items()}, table(costs))
    return 0


def table(costs: dict[str, Cost]) -> str:
    """The costs as text, with their total, and where a search keeps the vector's factors."""
    total = Cost(
        sum(cost.seconds for cost in costs.values()),
        max(cost.memory for cost in costs.values()),
        sum(cost.disk for cost in costs.values()),
    )
    lines = [f"{'':<14}{'seconds':>10}{'peak memory':>15}{'disk':>12}"]
    for name, cost in (*costs.items(), ("together", total)):
        lines.append(
            f"{name:<14}{cost.seconds:>10.1f}{cost.memory / 2**30:>11.2f} GiB{cost.disk / 2**30:>8.2f} GiB"
        )
    for cost in costs.values():
        if cost.factors is not None:
            lines.append(_FACTORS.format(**cost.factors))
    return "\n".join(lines)


def _launch(argv: Sequence[str], processes: int | None) -> tuple[Launch, list[str]]:
    if not wants_launch(argv):
        return Launch(processes or 1), list(argv)
    path, rest = take_config(argv)
    settings = read_yaml(path, "The launch configuration")
    deepspeed, count = settings.get("deepspeed_config") or {}, settings.get("num_processes") or 1
    if not isinstance(deepspeed, dict):
        raise ConfigError(
            f"`deepspeed_config` in the launch configuration {path} must be a block of keys and values."
        )
    check_value(f"num_processes in {path}", count, int, Rule(at_least=1))
    sharded = deepspeed.get("zero_stage") == 3 or settings.get("distributed_type") == "FSDP"
    return Launch(processes or count, sharded), rest


def _estimate_sft(argv: Sequence[str], launch: Launch) -> dict[str, Cost]:
    script, training, model, mixture, safegene = parse(
        sft.ARGUMENTS, argv, "safegene estimate sft", "", {"model_name_or_path": sft.NO_MODEL}
    )
    config, name, revision = safegene.config, model.model_name_or_path, model.model_revision
    if not name or config is None:
        raise ConfigError(
            "The recipe names no model or has no `safegene` block: there is no safety step to estimate."
        )
    dtype = resolve_dtype(model.dtype, name, revision)
    rows = None
    if not config.data.task_data:
        rows = split_of(
            training_data(script, mixture), script.dataset_train_split, "dataset_train_split"
        )
    probe = Probe(
        load_skeleton(name, revision),
        dtype,
        get_peft_config(model),
        training.gradient_checkpointing,
    )
    return _safeguarding(probe, config, load_tokenizer(name, revision), launch, rows)


def estimate_apply(
    argv: Sequence[str],
    launch: Launch = Launch(),  # noqa: B008  (frozen)
    timed: bool = True,
) -> dict[str, Cost]:
    """Costs of `safegene apply` with these options; untimed a quarter of the work, for the bytes
    alone.
    """
    arguments, block = parse(APPLY_ARGUMENTS, argv, "safegene estimate apply", "")
    config, name, revision = block.config, arguments.model_name_or_path, arguments.model_revision
    if not name or config is None:
        raise ConfigError(
            "No model or no safety vector is named: set `model_name_or_path` and `safegene`."
        )
    given = _check_apply(config, arguments)
    probe = Probe(
        load_skeleton(name, revision), resolve_dtype(arguments.dtype, name, revision), timed=timed
    )
    tokenizer = load_tokenizer(name, revision)
    if given:
        vector, _, _ = read_vector(config, probe.skeleton, tokenizer)
        return estimate_stored_merge(probe, config, vector, tokenizer)
    base = adapter_base(name, revision)
    origin = Origin(base, None, "full" if base is None else "lora", {FINE_TUNE: name})
    model = InputModel(probe.skeleton, load_processor(name, revision), origin)
    merges = config.output.output_format != "adapter"
    needed = checkpoint_bytes(probe.skeleton, model.written_types(config)) if merges else 0
    try_output(config, model, output_of(config, name), needed)
    return _safeguarding(probe, config, tokenizer, launch, None)


def _check_apply(config: SafeGeneConfig, arguments: ApplyArguments) -> bool:
    """Refuses what `apply` would refuse before it loads a model; whether coefficients are given."""
    name, given = check_arguments(
        config,
        str(arguments.model_name_or_path),
        arguments.model_revision,
        arguments.dtype,
        arguments.coefficients,
        arguments.base_model,
    )
    if given is None:
        return False
    check_measures_nothing(config)
    if given != INTERFERENCE:  # whose rule takes as long as a merge
        safeguard = replace(config, dry_run=True)
        apply(safeguard, name, model_revision=arguments.model_revision, coefficients=given)
    return True


def _safeguarding(
    probe: Probe, config: SafeGeneConfig, tokenizer: Any, launch: Launch, rows: Any
) -> dict[str, Cost]:
    vector, _, _ = read_vector(config, probe.skeleton, tokenizer)
    check_repair(config, vector.deltas)
    first_coefficients(config, vector)
    options = trained_options(None, rows)
    shots = gather_shots(config, vector, tokenizer, None, rows, template_options=options)
    return estimate_safeguard(probe, config, vector, tokenizer, shots, launch)


def _estimate_extract(argv: Sequence[str], launch: Launch) -> dict[str, Cost]:
    (config,) = parse((ExtractionConfig,), argv, "safegene estimate extract", "")
    config.check()
    if config.transports:
        return _estimate_transport(config, launch)
    if config.vector:
        return _estimate_retargeting(config, launch)
    name, revision = config.degraded_model, config.degraded_revision
    aligned, degraded = (
        StoredModel.open(config.aligned_model, config.aligned_revision),
        StoredModel.open(name, revision),
    )
    by_adapters = differ_by_adapters(config, aligned, degraded, name, revision)
    experts = not METHODS[config.method].distils
    difference = DifferingModules.between(aligned, degraded, by_adapters, config.rank, experts)
    probe = Probe(degraded.model, resolve_dtype(config.dtype, name, revision))
    prompts = ExtractionPrompts.read(config)
    tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
    return estimate_extraction(probe, config, tokenizer, prompts, difference, launch)


def _estimate_transport(config: ExtractionConfig, launch: Launch) -> dict[str, Cost]:
    check_other_family(config)
    prompts = ExtractionPrompts.read(config)
    texts = Texts(read_anchors(config, prompts.harmful), *prompts.to_answer())
    if config.source_vector:
        read_source_vector(config)
    sides = []
    for name, revision in (
        (config.source_model, config.source_revision),
        (config.aligned_model, config.aligned_revision),
    ):
        skeleton = StoredModel.open(name, revision).model
        probe = Probe(skeleton, resolve_dtype(config.dtype, name, revision))
        sides.append(Side(probe, load_tokenizer(name, revision)))
    return estimate_transport(sides[0], sides[1], config, prompts, texts, launch)


def _estimate_retargeting(config: ExtractionConfig, launch: Launch) -> dict[str, Cost]:
    known = KnownVector.read(config)
    config = known.settings(config)
    prompts = known.prompts(config)
    name, revision = config.aligned_model, config.aligned_revision
    tokenizer = load_tokenizer(name, revision)
    check_aligned(config, known.record, tokenizer)
    model = StoredModel.open(name, revision).model
    probe = Probe(model, resolve_dtype(config.dtype, name, revision))
    return estimate_retargeting(probe, config, tokenizer, prompts, known.record, launch)


def _estimate_audit(argv: Sequence[str], launch: Launch) -> dict[str, Cost]:
    if launch.processes > 1:
        raise ConfigError(
            f"An audit is one process's work: leave out `--num_processes` and `{OPTION}`."
        )
    (config,) = parse((AuditConfig,), named_vector(argv), "safegene estimate audit", "")
    plan = plan_audit(config)
    return estimate_audit(plan, look_at_models(plan))


_ESTIMATES = {
    "sft": _estimate_sft,
    "apply": estimate_apply,
    "extract": _estimate_extract,
    "audit": _estimate_audit,
}
