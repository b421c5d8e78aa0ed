"""`apply`: the safety step on a finished checkpoint or adapter, with coefficients that are found or
given.

The two ways are imported when they are taken: merging given coefficients from file to file needs
much less than a model does.
"""

from pathlib import Path
from typing import Any

from ..config.search import INTERFERENCE
from ..config.settings import SafeGeneConfig
from ..config.validation import DTYPES, Rule, check_is, check_value, shown
from ..distributed.world_size import launched_processes
from ..errors import ConfigError


NO_MODEL = "No model is named: set `model_name_or_path` to a finished checkpoint or adapter."


def apply(
    config: SafeGeneConfig,
    model_name_or_path: str | Path,
    *,
    model_revision: str | None = None,
    dtype: str = "auto",
    coefficients: float | str | Path | None = None,
    base_model: str | None = None,
    allow_pickled_shards: bool = False,
) -> dict[str, Any]:
    """Safeguards a finished checkpoint or LoRA adapter: recalibrates and merges a safety vector
    into a copy of it.

    Coefficients are searched for (SafeGene, arXiv 2606.06519) and the outcome is measured before
    and after. Given `coefficients` are taken as they are: the weights are then merged from file to
    file, in blocks, and nothing is loaded or measured. The model itself is never changed.
    Collective: every process of a launch calls it.

    Args:
        config: What to do. The checkpoint goes to its `output.output_dir`; default:
            `<model>-safeguarded` in the working directory. `data.task_data` must be set where
            coefficients are searched for. With `dry_run` everything is checked and nothing is
            written.
        model_name_or_path: Directory or hub id of the checkpoint or adapter.
        model_revision: Its branch, tag or commit on the hub.
        dtype: Data type to load it in, and to save it in unless `output.dtype` names another:
            `auto` (its own), `float32`, `float16` or `bfloat16`. With `coefficients` it stays
            `auto`.
        coefficients: Do not search: one number λ (0 or more, at most 100) for every layer; or the
            report of an earlier safety step with the same vector, a file or the folder it lies in;
            or `interference`, the rule of EnchTable (arXiv 2511.09880).
        base_model: The aligned model: directory or hub id. Only for `interference` on a full
            fine-tune.
        allow_pickled_shards: Read a `checkpoint-N` that holds nothing but DeepSpeed's shards. They
            are pickle files, which can run code: only for files of your own.

    Returns:
        The report, as in `safegene_report.json`: `status` is `safeguarded`, and `prepared` after a
            dry run;
        `coefficients` has λ by name, `decision` the outcome, `measured` shares (0–1) before and
            after, `held_out` losses
        in nats per response token, `phases` seconds and peak MiB.

    Raises:
        ConfigError: A value is missing, impossible, or contradicts another one.
        VectorError: The vector is missing, incomplete or altered.
        SignatureError: It is not signed as `config.public_key` asks.
        FamilyError: Model and vector do not belong to one family.
        UnsupportedModelError: The fine-tune is of a kind that cannot be safeguarded, or safeguarded
            already.
        CheckpointError: Its weight files are missing or damaged.
        CalibrationDataError: Prompts or task samples cannot be used.
        OutputError: The checkpoint cannot be written where it was asked for.
        RejectedError: No coefficients are acceptable, or the gate's limits are not kept; no
            checkpoint is written, the failure report lies beside its place.
        UnexpectedError: Anything else failed in the step.
    """
    check_value("allow_pickled_shards", allow_pickled_shards, bool)
    name, given = check_arguments(
        config, model_name_or_path, model_revision, dtype, coefficients, base_model
    )
    target = output_of(config, name)
    if given is None:
        from .apply_with_search import safeguard_loaded

        return safeguard_loaded(config, name, model_revision, target, dtype, allow_pickled_shards)
    if launched_processes() > 1:
        raise ConfigError(
            "`coefficients` are merged from file to file by one process: leave out the launcher."
        )
    from .apply_with_coefficients import safeguard_stored

    return safeguard_stored(config, name, model_revision, given, target, base_model)


def check_arguments(
    config: SafeGeneConfig,
    model_name_or_path: str | Path,
    model_revision: str | None,
    dtype: str,
    coefficients: float | str | Path | None,
    base_model: str | None,
) -> tuple[str, str | None]:
    """What `apply` is given, checked as far as no file needs to be read: the model's name, and the
    coefficients as text.

    Raises:
        ConfigError: A value is missing, impossible, or contradicts another one.
    """
    check_is(config, SafeGeneConfig, "apply")
    config.check()
    check_value("model_revision", model_revision, str | None)
    check_value("dtype", dtype, str, Rule(choices=DTYPES))
    given = str(coefficients) if isinstance(coefficients, Path) else coefficients
    check_value("coefficients", given, float | str | None)
    check_value("base_model", base_model, str | None)
    if base_model is not None and given != INTERFERENCE:
        raise ConfigError(
            "`base_model` is read for `coefficients: interference` alone: leave it out."
        )
    if given is not None and dtype != "auto":
        raise ConfigError(
            "With `coefficients` nothing is loaded: leave out `dtype`, and name the type that is written as `output.dtype`."
        )
    name = str(model_name_or_path or "")
    if not name:
        raise ConfigError(NO_MODEL)
    if given is not None:
        _check_coefficients(str(given))
        return name, str(given)
    if config.data.task_data is None:
        raise ConfigError(
            "`data.task_data` is not set: name the data the model was fine-tuned on (`--safegene.data.task_data FILE`), to measure utility."
        )
    return name, None


def _check_coefficients(given: str) -> None:
    """Raises `ConfigError` for what is neither a number nor `interference` nor a path."""
    try:
        float(given)
    except ValueError:
        if given != INTERFERENCE and not Path(given).exists():
            raise ConfigError(
                f"`coefficients` is {shown(given)}, which is no readable report of a safety step: give a number for every layer, "
                "`interference`, or a `safegene_report.json` or its folder."
            ) from None


def output_of(config: SafeGeneConfig, model_name_or_path: str) -> Path:
    """The folder that `apply` writes."""
    return Path(config.output.output_dir or f"{Path(model_name_or_path).name}-safeguarded")
