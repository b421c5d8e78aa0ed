"""Utility of a model, by lm-eval: tasks of its own collection, or YAML files of one's own."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.memory import has_own_memory
from ..errors import ConfigError
from ..models.batch_size import ON_CPU


def check_tasks(tasks: Sequence[str], tasks_dir: str | None) -> Any:
    """lm-eval's task manager, if it is installed and knows all `tasks`.

    Raises:
        ConfigError: It is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "Utility tasks need lm-eval: pip install 'safegene-trl[eval]'."
        ) from error
    # Reading its whole collection takes a while: only where a task is not among one's own.
    manager = TaskManager(include_path=tasks_dir, include_defaults=False) if tasks_dir else None
    if manager is None or _unknown(manager, tasks):
        manager = TaskManager(include_path=tasks_dir)
    if unknown := _unknown(manager, tasks):
        raise ConfigError(
            f"lm-eval knows no task `{unknown[0]}`: list its tasks by `lm-eval ls tasks`, or name the folder of your YAML file in "
            "`tasks_dir`."
        )
    return manager


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def measure_utility(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    batch_size: int | None,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """Metrics of every task (with lm-eval's standard errors), and the versions and settings behind
    them.

    The chat template is applied where the tokenizer has one.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    device: Any = next(model.parameters()).device
    # unset it is left to lm-eval, which tries out what fits, but not on a CPU
    size = batch_size or ("auto" if has_own_memory(device) else ON_CPU)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device=str(device))
    found: Any = lm_eval.simple_evaluate(
        wrapped,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=bool(tokenizer.chat_template),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        "results": {task: _numbers(metrics) for task, metrics in found["results"].items()},
        "versions": {"lm_eval": lm_eval.__version__, "tasks": found["versions"]},
        "n_shot": found["n-shot"],
        "samples": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "limit": limit,
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
