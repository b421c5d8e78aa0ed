"""The safety step on a live model: where a training ends, or on a finished checkpoint that has been
loaded.

Coefficients are searched with the vector attached beside the weights. What is decided rests on the
weights as they are shipped: they take the live ones' place for as long as they are measured.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from ..checkpoints.adapter_output import save_adapter
from ..checkpoints.contents import TOUCH_UP
from ..checkpoints.live_merge import check_ranges, save_merged
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.reloaded import can_reload, reloaded
from ..checkpoints.write_errors import writing
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.batch_size import halving
from ..models.coefficients import CoefficientSpace
from ..models.inputs import padding_id
from ..models.low_rank import LowRankDelta
from ..models.replacement import without_adapters
from ..progress import bar_of, progress_shown
from ..recalibration.objective import Losses
from ..recalibration.search import Recalibration, recalibrate
from ..recalibration.touch_up import STEPS, TouchUp, train_touch_up
from .decision import decide, prompts_of_vector, unfinished, unjudged
from .finished_training import FinishedTraining, check_finished
from .measurement import Measurement
from .plan import Found
from .preparation import Preparation
from .probe import (
    ADAPTER_TOLERANCE,
    DAMAGED,
    MERGED_TOLERANCE,
    MORE_THAN_WEIGHTS,
    RELOADED_TOLERANCE,
    Probe,
)
from .quantized_step import MergedIntoBase
from .read_back import as_written, with_adapter
from .repair import TOUCHED_UP, Rung, climbed, with_touch_up
from .run import run
from .shipped_weights import ShippedWeights, TriedRounding, beside_weights, merged_weights


logger = logging.getLogger(__name__)


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
    with progress_shown(show_progress and fine_tune.sharding.is_main):
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
        self.quantized = prepared.quantized
        self._on_base: MergedIntoBase | None = None  # on rank 0, once it is written
        self._rounding = TriedRounding()
        self._weights = ShippedWeights(self._shipped)
        self._measurement: Measurement | None = None
        self._probe = Probe(
            self.shots.data.harmful.held_out, padding_id(self.plan.tokenizer), self.sharding
        )

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
        if self._merges_live:
            check_ranges(self.model, plan.types, self.sharding)
        with closing(self._weights):
            result = self._recalibrate()
            report.coefficients, report.history = result.coefficients, result.history
            report.untouched, report.search = result.untouched or None, result.passes
            report.held_out = {
                "before": result.held_out_before.to_dict(),
                "after": result.held_out_after.to_dict(),
            }
            added = self._lacking(result.coefficients)
            vector = self._rung(result, added, result.accepted, result.held_out_after)
            rung, learned = climbed(
                plan,
                vector,
                partial(self._touch_up, result, vector),
                lambda both, held_out: self._rung(result, both, True, held_out),
            )
        decision, self._probe.measured = rung.decision, rung.logits
        report.measured = rung.measured
        report.held_out["after"] = rung.held_out.to_dict()
        if rung.rounding is not None:
            report.shipped = {"rounding": rung.rounding}
        for unseen in filter(None, (unfinished(report.measured), unjudged(report.measured))):
            report.warnings.append(unseen)
            if self.sharding.is_main:
                logger.warning("%s", unseen)
        if not rung.taken and decision.outcome != "rejected":  # nothing was changed
            report.held_out["after"] = report.held_out["before"]
        return Found(result.coefficients, decision, rung.added, result.scale, learned)

    def _recalibrate(self) -> Recalibration:
        config = self.plan.config
        shown = self.show_progress and self.sharding.is_main
        with bar_of("Recalibrating", config.search.max_evaluations, shown) as bar:

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

    def _rung(
        self, result: Recalibration, added: ScaledVector, taken: bool, held_out: Losses
    ) -> Rung:
        """What comes of adding something, measured and decided."""
        plan, gate = self.plan, self.plan.config.gate
        with plan.clock.phase("measure"):
            plan.report.measured, rounding = self._measured(taken, added)
        reason = result.reason if added.deltas is self.vector.deltas else TOUCHED_UP
        own = prompts_of_vector(gate, self.shots.record["unseen"])
        decision = decide(gate, taken, result.scale, reason, plan.report.measured, own)
        measured, logits = plan.report.measured, self._probe.measured
        return Rung(added, taken, held_out, measured, decision, rounding, logits)

    def _touch_up(self, result: Recalibration, rung: Rung) -> tuple[TouchUp, ScaledVector]:
        """Trains a touch-up beside the vector; what the weights then lack, together with the
        vector.
        """
        self._weights.close()
        added = rung.added

        def ship(deltas: Mapping[str, LowRankDelta]) -> AbstractContextManager[None]:
            nonlocal added
            added = with_touch_up(rung.added, deltas) if deltas else rung.added
            return self._weights.of(added)

        shown = self.show_progress and self.sharding.is_main
        with (
            bar_of("Touching up", STEPS, shown) as bar,
            self.plan.clock.phase("touch_up"),
        ):
            found = train_touch_up(
                self.attachment,
                self.shots.data,
                self.plan.config,
                padding_id(self.plan.tokenizer),
                result,
                ship,
                bar.update,
            )
        return found, added

    def _lacking(self, coefficients: Mapping[str, float]) -> ScaledVector:
        change = {name: value - self.plan.carried[name] for name, value in coefficients.items()}
        return ScaledVector(self.vector.deltas, self.space.by_module(change))

    def shipped_with(self, values: np.ndarray) -> AbstractContextManager[None]:
        """While open, the model is the one that would be shipped with these coefficients, shape
        `(n,)`; and afterwards, until it is another one or `find` ends.
        """
        return self._weights.of(self._lacking(self.space.named(values)))

    def _shipped(self, added: ScaledVector) -> AbstractContextManager[None]:
        """While open, the model is the one that is shipped: merged, or with its adapter beside the
        weights; of a quantised base the latter in any case.
        """
        if self._merges_live:
            self._rounding = TriedRounding()
            types = self.plan.types
            return merged_weights(self.model, added, self.sharding, self._rounding, types)
        return beside_weights(self.model, added, self.sharding)

    def _measured(
        self, taken: bool, added: ScaledVector
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What was measured with it, and what is left of it by the data types."""
        plan = self.plan
        if not (taken or plan.config.gate):  # it will be rejected
            return None, None

        @contextmanager
        def shipped() -> Iterator[None]:
            with self._weights.of(added):
                self._probe.measured = self._probe.logits(self.model)
                yield
            self._weights.close()

        measured = rounding = None
        if any(self.shots.unseen.counts.values()):
            if self._measurement is None:
                unseen = self.shots.unseen
                self._measurement = Measurement(unseen, plan.tokenizer, plan.config, self.sharding)
            measured = halving(
                self._measurement.at_once(self.model),
                partial(self._measurement.measure, self.model, shipped),
                self.sharding,
            )
        else:
            with frozen_for_calibration(self.model), shipped():
                pass
        changes = map(torch.as_tensor, added.coefficients.values())
        if self._merges_live and any(bool(value.any()) for value in changes):
            with self.sharding.raising_together():
                if self.sharding.is_main:
                    rounding = self._rounding.check()
        return measured, rounding

    @property
    def _merges_live(self) -> bool:
        """Whether what is written is made from the live weights."""
        return self.plan.merges and self.quantized is None

    def write(self, folder: Path, found: Found) -> dict[str, str]:
        """Writes the merged checkpoint, the adapter, or both."""
        plan, vector = self.plan, found.added
        digests: dict[str, str] = {}
        if plan.merges:
            checkpoint = plan.merged_folder(folder, found)
            if self.quantized is None:
                save_merged(self.model, vector, checkpoint, self.sharding, plan.types)
            else:
                with self.sharding.on_main_rank() as working:
                    if working:
                        self._on_base = self.quantized.write(
                            self.model, vector, checkpoint, self.show_progress
                        )
            digests = checkpoint.digests
        with self.sharding.raising_together(), writing():
            if self.sharding.is_main and found.touch_up is not None:
                # servers take every safetensors file beside the weights for weights
                (folder / TOUCH_UP).parent.mkdir()
                (folder / TOUCH_UP).write_bytes(found.touch_up.content)
        if place := plan.adapter_place(folder):
            save_adapter(
                self.model, vector, self.adapter_base, plan.processor, place, self.sharding
            )
        return digests

    def compare(self, folder: Path) -> dict[str, Any]:
        """Puts what was written into the live model's place, and compares its logits with those
        that were measured. What was merged into a quantised model's 16-bit base has no place there:
        its tensors are worked out anew.

        Raises:
            OutputError: They are further apart than other kernels could put them.
            CheckpointError: A tensor is missing.
        """
        distances = {}
        with frozen_for_calibration(self.model):
            if self._merges_live:
                with as_written(self.model, folder, self.sharding, self.plan.types):
                    logits = self._probe.logits(self.model)
                    distances["merged"] = self._probe.distance(logits, MERGED_TOLERANCE, DAMAGED)
                    distances |= self._reloaded(folder, self._probe)
            elif self.plan.merges:
                with without_adapters(self.model):  # for the config that was written
                    alone = copy(self._probe)
                    alone.measured = alone.logits(self.model)
                    distances |= self._reloaded(folder, alone)
            if place := self.plan.adapter_place(folder):
                with with_adapter(self.model, place, self.sharding):
                    logits = self._probe.logits(self.model)
                    distances["adapter"] = self._probe.distance(logits, ADAPTER_TOLERANCE, DAMAGED)
        found: dict[str, Any] = {}
        if distances:
            farthest = max(distances.values())
            found = {"largest_logit_distance": farthest, "logit_distances": distances}
        return found | self._compared_with_base(folder)

    def _reloaded(self, folder: Path, probe: Probe) -> dict[str, float]:
        """How far a model made from the written config, on the tensors in place, is from the live
        one; empty where it cannot be made.
        """
        if not can_reload(self.model, self.sharding):
            return {}
        logits = probe.measured
        with self.sharding.raising_together():
            if self.sharding.is_main:  # who alone has the files
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                logits = probe.logits(reloaded(self.model, config))
        return {"reloaded": probe.distance(logits, RELOADED_TOLERANCE, MORE_THAN_WEIGHTS)}

    def _compared_with_base(self, folder: Path) -> dict[str, Any]:
        """What was merged into the 16-bit base of a quantised one, held against what it should be."""
        found: dict[str, Any] = {}
        if self.plan.merges and self.quantized is not None:
            with self.sharding.on_main_rank() as working:
                if working and self._on_base is not None:
                    found = self._on_base.check(folder)
        return found
