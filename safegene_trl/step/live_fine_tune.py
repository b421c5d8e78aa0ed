"""The safety step on a live model: where a training ends, or on a finished checkpoint that has been
loaded.

Coefficients are searched with the vector attached beside the weights. What is decided rests on the
weights as they are shipped: they take the live ones' place for as long as they are measured.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..checkpoints.adapter import read_adapter, save_adapter
from ..checkpoints.live_merge import checkpoint_bytes, merged_tensor, save_merged
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.reloaded import can_reload, reloaded
from ..checkpoints.row_blocks import RowReader
from ..checkpoints.zero_shards import holds_only_zero_shards
from ..config.settings import SafeGeneConfig
from ..data.rows import Row
from ..data.shots import Shots, gather_shots
from ..distributed.layouts import Sharding
from ..errors import ConfigError, OutputError, UnsupportedModelError
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.batch_size import fitting_answers, halving
from ..models.coefficients import CoefficientSpace
from ..models.inputs import Batch, batches, padding_id, prompt_text
from ..models.losses import response_logits
from ..models.low_rank import LowRankDelta, broadcast_deltas
from ..models.parameters import (
    Parameter,
    base_model,
    canonical_parameters,
    check_adapter_output,
    check_supported,
    task_factors,
)
from ..models.replacement import replaced, without_adapters
from ..models.rounding import Rounding
from ..recalibration.search import Recalibration, recalibrate
from ..vectors.safety_vector import SafetyVector
from .decision import check_measurable, decide, independent_prompts
from .finished_training import FinishedTraining, check_finished
from .history import last_accepted, read_history
from .lineage import Coefficients, check_verified, reported_coefficients, vector_id
from .measurement import measure
from .plan import FINE_TUNE, Found, Origin, Plan, plan_step
from .read_back import WrittenTensors
from .run import run


PROBE_SAMPLES = 4  # of the held-out refusals: enough to tell one model from another
MERGED_TOLERANCE = 1e-3  # of the largest logit: other kernels, the same weights
ADAPTER_TOLERANCE = 0.05  # the same of an adapter, whose factors another data type computes with
RELOADED_TOLERANCE = (
    0.05  # autocast, fused kernels: what the live model has and a fresh one has not
)
DAMAGED = (
    "The written checkpoint is not the model that was measured (its logits differ by {distance}): do not use it; check the "
    "disk, then run it again."
)
MORE_THAN_WEIGHTS = (
    "A model loaded from the checkpoint is not the fine-tune (its logits differ by {distance}): a hook, a module of your own "
    "or a setting changed after loading acts on the fine-tune; remove it, or set it in the config the model is made from."
)
Attach = Callable[[torch.Tensor], AbstractContextManager[None]]


@dataclass
class Preparation:
    """A plan with what the search needs.

    Attributes:
        start: Coefficients at which the search starts, by name; None for its default.
    """

    plan: Plan
    shots: Shots
    start: Coefficients | None

    @property
    def target(self) -> Path:
        return self.plan.target

    @property
    def sharding(self) -> Sharding:
        return self.plan.sharding


def prepare(
    config: SafeGeneConfig,
    model: nn.Module,
    processor: Any,
    target: Path,
    sharding: Sharding,
    origin: Origin | None = None,
    task_rows: Sequence[Row] | IterableDataset | None = None,
    packed: bool | None = None,
) -> Preparation:
    """Reads and checks vector, family, data and output place, and that the vector reaches the
    logits; writes nothing.

    Collective, like everything here: every rank calls it, and if it fails on one it raises on all.

    Args:
        config: What to do.
        model: The model as it is now, plain or PEFT-wrapped; it is left as it is.
        processor: Its tokenizer, or the processor that holds it.
        target: Folder of the checkpoint to be.
        sharding: How the model is spread over ranks.
        origin: Where the fine-tune comes from. Default: not known.
        task_rows: The training set, used where `config.data.task_data` names no other.
        packed: Whether its rows were packed without keeping their boundaries. Default: told from
            the rows.

    Raises:
        SafeGeneError: One of its kinds, saying what to do.
    """
    origin = origin or Origin(None, None, "lora" if isinstance(model, PeftModel) else "full")
    with sharding.raising_together():
        check_supported(model)
        if config.output.output_format != "merged":
            check_adapter_output(model)
            _check_base(origin)
        needed = 0 if config.output.output_format == "adapter" else checkpoint_bytes(model)
    plan = plan_step(config, model, processor, target, sharding, origin, needed)
    with plan.clock.phase("prepare"), sharding.raising_together():
        plan.find_carried(model, config.search.granularity)
        check_verified(plan.carried)
        context = getattr(base_model(model).config, "max_position_embeddings", None)
        shots = gather_shots(config, plan.vector, plan.tokenizer, context, task_rows, packed)
        if config.gate:
            check_measurable(config.gate, shots.unseen.counts)
        start = _first_coefficients(config, plan.vector)
    sharding.check_same("samples", json.dumps(shots.record, sort_keys=True))
    sharding.check_same("coefficients to start from", json.dumps(start, sort_keys=True))
    plan.report.data = shots.record
    with plan.clock.phase("prepare"):
        attachment = VectorAttachment(
            model,
            plan.vector.deltas,
            plan.vector.space(config.search.granularity),
            sharding,
            plan.carried,
        )
        sample = _shortest(shots, plan)
        _check_reloads(model, sample, sharding)
        attachment.verify(sample)
    return Preparation(plan, shots, start)


def _check_base(origin: Origin) -> None:
    """Raises `UnsupportedModelError` where PEFT could not load the finished full fine-tune that an
    adapter would be relative to.
    """
    place = origin.places.get(FINE_TUNE)
    if place is not None and origin.kind == "full" and holds_only_zero_shards(Path(place)):
        raise UnsupportedModelError(
            f"{place} holds only DeepSpeed's own shards, which PEFT cannot load as the base model of an adapter: convert them by "
            "DeepSpeed's `zero_to_fp32.py --safe_serialization`, or set `output.output_format` to `merged`."
        )


@torch.no_grad()
def _check_reloads(model: nn.Module, sample: Batch, sharding: Sharding) -> None:
    """Raises `UnsupportedModelError` where a model loaded from a checkpoint of the live one would
    compute something else.
    """
    if not can_reload(model, sharding):
        return
    with frozen_for_calibration(model), without_adapters(model), sharding.raising_together():
        config = base_model(model).config
        fresh = reloaded(model, type(config).from_dict(config.to_dict()))
        # of a model that has diverged already something else is to be said
        here, there = (response_logits(each, sample)[0].nan_to_num() for each in (model, fresh))
        distance = float((here - there).abs().max())
        if not distance <= RELOADED_TOLERANCE * max(1.0, float(here.abs().max())):
            raise UnsupportedModelError(MORE_THAN_WEIGHTS.format(distance=f"{distance:.3g}"))


def _shortest(shots: Shots, plan: Plan) -> Batch:
    """One short sample."""
    sample = min(shots.data.harmful.fit, key=lambda sample: len(sample.input_ids))
    return batches([sample], 1, padding_id(plan.tokenizer), plan.sharding.device)[0]


def _first_coefficients(config: SafeGeneConfig, vector: SafetyVector) -> Coefficients | None:
    """Those of the release that the search is to start from, None where there is none."""
    space = vector.space(config.search.granularity)
    if config.search.warm_start is not None:
        found = space.refined(reported_coefficients(config.search.warm_start, vector))
        if found is None:
            raise ConfigError(
                f"The coefficients in {config.search.warm_start} are not one per {config.search.granularity}: set `search.granularity` as it was "
                "there."
            )
        return found
    last = (
        last_accepted(read_history(Path(config.output.history))) if config.output.history else None
    )
    if last is None or last["vector"]["sha256"] != vector_id(vector):
        return None
    return space.refined(last["coefficients"])


def safeguard(
    prepared: Preparation,
    model: nn.Module,
    adapter_base: str,
    show_progress: bool = True,
    training: FinishedTraining | None = None,
) -> dict[str, Any]:
    """The whole step on a finished fine-tune; returns the report that lies beside the checkpoint.
    See `run.run`.

    Args:
        prepared: From `prepare`.
        model: The finished fine-tune; left as it is.
        adapter_base: Name of the checkpoint that a saved adapter is relative to; empty for the
            place where `training` is kept.
        show_progress: Whether to show a progress bar.
        training: The training that it comes from, whose fine-tune is first put on disk. Default: it
            lies there already, as `adapter_base` of a full fine-tune says.
    """
    fine_tune = LiveFineTune(prepared, model, adapter_base, show_progress)
    fine_tune.training = training
    return run(prepared.plan, fine_tune)


class LiveFineTune:
    """A live model as the step works on it."""

    def __init__(
        self, prepared: Preparation, model: nn.Module, adapter_base: str, show_progress: bool = True
    ):
        self.plan, self.shots, self.start = prepared.plan, prepared.shots, prepared.start
        self.model, self.adapter_base, self.show_progress = model, adapter_base, show_progress
        self.sharding, self.vector = self.plan.sharding, self.plan.vector
        self.space: CoefficientSpace = self.vector.space(self.plan.granularity)
        self.attachment = VectorAttachment(
            model, self.vector.deltas, self.space, self.sharding, self.plan.carried
        )
        self.training: FinishedTraining | None = None
        self._rounding = Rounding()
        self._logits = torch.empty(0)  # of the probe, on the model that was measured

    def keep(self) -> Path | str:
        """Where the plain fine-tune lies: a training's is saved if no checkpoint of the training
        holds it.
        """
        if self.training is None:
            return self.adapter_base
        # an adapter on a full fine-tune names it as its base model
        loadable = self.plan.config.output.output_format != "merged" and not self.adapter_base
        with self.plan.clock.phase("keep"):
            place = self.training.keep(self.model, self.plan.processor, self.sharding, loadable)
        self.adapter_base = self.adapter_base or place
        return place

    def find(self) -> Found:
        """Searches, tries what was found as it would be shipped, measures and decides."""
        plan, report = self.plan, self.plan.report
        with self.sharding.raising_together():
            check_finished(self.model, plan.merges or plan.origin.kind == "full")
        self.sharding.reshard()
        result = self._recalibrate()
        report.coefficients, report.history = result.coefficients, result.history
        report.untouched, report.search = result.untouched or None, result.passes
        report.held_out = {
            "before": result.held_out_before.to_dict(),
            "after": result.held_out_after.to_dict(),
        }
        by_module = self._lacking(result.coefficients)
        with plan.clock.phase("measure"):
            report.measured = self._measured(result, by_module)
        gate, independent = (
            plan.config.gate,
            independent_prompts(plan.config.gate, self.shots.record["unseen"]),
        )
        decision = decide(
            gate, result.accepted, result.scale, result.reason, report.measured, independent
        )
        if not result.accepted and decision.outcome != "rejected":  # nothing was changed
            report.held_out["after"] = report.held_out["before"]
        return Found(result.coefficients, decision, by_module, result.scale)

    def _recalibrate(self) -> Recalibration:
        config = self.plan.config
        hidden = not (self.show_progress and self.sharding.is_main)
        with tqdm(
            total=config.search.max_evaluations, desc="Recalibrating", disable=hidden, leave=False
        ) as bar:

            def advance(entry: dict) -> None:
                bar.update()
                bar.set_postfix({key: f"{entry[key]:.3f}" for key in ("safety", "utility")})

            with self.plan.clock.phase("recalibrate"):
                return recalibrate(
                    self.attachment,
                    self.shots.data,
                    config,
                    padding_id(self.plan.tokenizer),
                    advance,
                    self.start,
                    self.shipped_with,
                )

    def _lacking(self, coefficients: Mapping[str, float]) -> dict[str, torch.Tensor]:
        change = {name: value - self.plan.carried[name] for name, value in coefficients.items()}
        return self.space.by_module(change)

    def shipped_with(self, values: np.ndarray) -> AbstractContextManager[None]:
        """While open, the model is the one that would be shipped with these coefficients, shape
        `(n,)`.
        """
        return self._shipped(self._lacking(self.space.named(values)))

    @contextmanager
    def _shipped(
        self, by_module: Mapping[str, torch.Tensor], rounding: Rounding | None = None
    ) -> Iterator[None]:
        """The weights as they are written: the LoRA folded in, added in float32, rounded to their
        data type.

        Where only an adapter is written, it acts beside the weights there too.
        """
        if not self.plan.merges:
            lacking = torch.cat([by_module[name] for name in self.vector.deltas]).to(
                self.sharding.device
            )
            with by_rank(self.model, self.vector.deltas, self.sharding).applied(lacking):
                yield
            return
        merged = partial(self._merged, by_module=by_module, rounding=rounding)
        with (
            replaced(list(canonical_parameters(self.model)), merged, self.sharding),
            without_adapters(self.model),
        ):
            yield

    def _merged(
        self, parameter: Parameter, by_module: Mapping[str, torch.Tensor], rounding: Rounding | None
    ) -> torch.Tensor | None:
        """The shipped tensor of a parameter; None for one that is shipped as it is."""
        if not parameter.is_weight:
            return None
        if parameter.module_name not in self.vector.deltas and not task_factors(parameter.module):
            return None
        vector = ScaledVector(self.vector.deltas, by_module)
        return merged_tensor(parameter, vector, self.sharding, rounding)

    def _measured(
        self, result: Recalibration, by_module: Mapping[str, torch.Tensor]
    ) -> dict[str, Any] | None:
        plan = self.plan
        if not (result.accepted or plan.config.gate):  # it will be rejected
            return None

        @contextmanager
        def shipped() -> Iterator[None]:
            self._rounding = Rounding()
            with self._shipped(by_module, self._rounding):
                self._logits = self._probe()
                yield

        measured = None
        if any(self.shots.unseen.counts.values()):
            measured = halving(
                self._answers_at_once(),
                partial(
                    measure,
                    self.model,
                    shipped,
                    self.shots.unseen,
                    plan.tokenizer,
                    plan.config,
                    self.sharding,
                ),
                self.sharding,
            )
        else:
            with frozen_for_calibration(self.model), shipped():
                pass
        if plan.merges and any(bool(value.any()) for value in by_module.values()):
            with self.sharding.raising_together():
                if self.sharding.is_main:
                    plan.report.shipped = {"rounding": self._rounding.check()}
        return measured

    def _answers_at_once(self) -> int:
        """Prompts, or task samples, that are measured in one forward pass."""
        config, tokenizer, unseen = self.plan.config, self.plan.tokenizer, self.shots.unseen
        texts = [
            prompt_text(tokenizer, list(p.messages))
            for kind in unseen.prompts.values()
            for p in kind
        ]
        prompts = (
            [len(ids) + config.measure.max_new_tokens for ids in tokenizer(texts)["input_ids"]]
            if texts
            else []
        )
        samples = [len(sample.input_ids) for sample in unseen.task]
        responses = max((sum(sample.is_response) for sample in unseen.task), default=1)
        return fitting_answers(
            config.batch_size,
            base_model(self.model),
            max(prompts + samples),
            responses,
            self.sharding,
        )

    @torch.no_grad()
    def _probe(self, model: nn.Module | None = None) -> torch.Tensor:
        """Logits (tokens×vocabulary, float32, CPU) of a few held-out refusals. Collective where
        forward passes are.

        One by one: where memory is short, nothing takes less.
        """
        pad, samples = (
            padding_id(self.plan.tokenizer),
            self.shots.data.harmful.held_out[:PROBE_SAMPLES],
        )
        found = []
        for batch in batches(samples, 1, pad, self.sharding.device):
            found.append(response_logits(model or self.model, batch)[0].cpu())
            self.sharding.reshard()
        return torch.cat(found)

    def write(self, folder: Path, found: Found) -> None:
        """Writes the merged checkpoint, the adapter, or both."""
        plan, vector = self.plan, ScaledVector(self.vector.deltas, found.by_module)
        if plan.merges:
            checkpoint = plan.merged_folder(folder, found.coefficients)
            save_merged(self.model, vector, checkpoint, self.sharding)
        if place := plan.adapter_place(folder):
            save_adapter(
                self.model, vector, self.adapter_base, plan.processor, place, self.sharding
            )

    def compare(self, folder: Path) -> dict[str, Any]:
        """Puts what was written into the live model's place, and compares its logits with those
        that were measured.

        Raises:
            OutputError: They are further apart than other kernels could put them.
            CheckpointError: A tensor is missing.
        """
        distances = {}
        with frozen_for_calibration(self.model):
            if self.plan.merges:
                with self._as_written(folder):
                    distances["merged"] = self._distance(self._probe(), MERGED_TOLERANCE, DAMAGED)
                    if can_reload(self.model, self.sharding):
                        answers = self._logits
                        with self.sharding.raising_together():
                            if self.sharding.is_main:  # who alone has the files
                                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                                answers = self._probe(reloaded(self.model, config))
                        distances["reloaded"] = self._distance(
                            answers, RELOADED_TOLERANCE, MORE_THAN_WEIGHTS
                        )
            if place := self.plan.adapter_place(folder):
                with self._with_adapter(place):
                    distances["adapter"] = self._distance(self._probe(), ADAPTER_TOLERANCE, DAMAGED)
        return {"largest_logit_distance": max(distances.values()), "logit_distances": distances}

    def _distance(self, logits: torch.Tensor, tolerance: float, otherwise: str) -> float:
        size = max(1.0, float(self._logits.abs().max()))
        own = torch.tensor([float((self._logits - logits).abs().max()), size], dtype=torch.float64)
        distance, size = self.sharding.broadcast(
            own
        ).tolist()  # whole weights are read back by rank 0 alone
        if not distance <= tolerance * size:
            raise OutputError(otherwise.format(distance=f"{distance:.3g}"))
        return distance

    @contextmanager
    def _as_written(self, folder: Path) -> Iterator[None]:
        """While open, every live tensor holds what the checkpoint's files say."""
        with RowReader() as reader:
            value = WrittenTensors(self.model, folder if self.sharding.is_main else None, reader)
            with (
                replaced(list(canonical_parameters(self.model)), value, self.sharding),
                without_adapters(self.model),
            ):
                with self.sharding.raising_together():
                    value.check_complete()
                yield

    @contextmanager
    def _with_adapter(self, place: Path) -> Iterator[None]:
        """While open, the written adapter acts in the place of the fine-tune's own."""
        with self.sharding.raising_together():
            deltas = read_adapter(place) if self.sharding.is_main else {}
        deltas = broadcast_deltas(deltas, self.sharding)
        ones = torch.ones(
            sum(delta.a.shape[0] for delta in deltas.values()), device=self.sharding.device
        )
        with without_adapters(self.model), by_rank(self.model, deltas, self.sharding).applied(ones):
            yield


def by_rank(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], sharding: Sharding
) -> VectorAttachment:
    """An attachment with a coefficient for each rank-one part of every module, module by module."""
    rank = next(iter(deltas.values())).a.shape[0]
    return VectorAttachment(model, deltas, CoefficientSpace.of(deltas, [rank], "rank"), sharding)
