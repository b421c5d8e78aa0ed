"""The run that costs are told of: on which model, with which vector, in how many processes."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..models.attachment import VectorAttachment
from ..models.coefficients import CoefficientSpace
from ..models.generation import generate_answers
from ..models.inputs import padding_id
from ..models.low_rank import LowRankDelta
from .cost import Cost, Launch
from .probe import Probe


@dataclass(frozen=True)
class PlannedRun:
    """The run that costs are told of.

    Attributes:
        probe: Of its model.
        tokenizer: Its tokenizer.
        launch: How it will be launched.
        deltas: The like of its vector's, for both of the probe's models.
        held: Bytes that one process holds all the while: itself, its model's weights, and a vector
            that is there from the beginning.
    """

    probe: Probe
    tokenizer: PreTrainedTokenizerBase
    launch: Launch
    deltas: Sequence[Mapping[str, LowRankDelta]]
    held: int

    @classmethod
    def of(
        cls,
        probe: Probe,
        tokenizer: PreTrainedTokenizerBase,
        launch: Launch,
        deltas: Sequence[Mapping[str, LowRankDelta]],
        stored: int = 0,
    ) -> "PlannedRun":
        """A run that holds `stored` bytes of a vector beside the model's weights."""
        weights = launch.held(probe.weights, probe.dtype.itemsize)
        return cls(probe, tokenizer, launch, deltas, probe.process + weights + stored)

    @property
    def padding_id(self) -> int:
        """The id that fills up a batch."""
        return padding_id(self.tokenizer)

    def cost(self, seconds: float, memory: int, disk: int = 0) -> Cost:
        """What a step takes whose transient bytes come on top of what is held."""
        return Cost(seconds, self.held + memory, disk)

    def kept_beside(self, references: int) -> int:
        """What references add to the memory that counts: they lie in the host's."""
        return references if self.probe.alone.device.type == "cpu" else 0

    def attachment(self, index: int) -> VectorAttachment:
        """The vector's like on one of the probe's models."""
        own = self.deltas[index]
        rank = next(iter(own.values())).a.shape[0]
        space = CoefficientSpace.of(own, [rank], "layer")
        return VectorAttachment(self.probe.models[index], own, space, self.probe.alone)

    def answers(
        self,
        kinds: Sequence[Sequence[list[dict[str, str]]]],
        max_new_tokens: int,
        batch_size: int,
        with_vector: bool,
    ) -> tuple[float, int]:
        """Seconds and transient bytes of greedy answers to all prompts of each kind."""
        found = [
            self._answers_to(prompts, max_new_tokens, batch_size, with_vector)
            for prompts in kinds
            if prompts
        ]
        return sum(seconds for seconds, _ in found), max(peak for _, peak in found)

    def _answers_to(
        self,
        prompts: Sequence[list[dict[str, str]]],
        max_new_tokens: int,
        batch_size: int,
        with_vector: bool,
    ) -> tuple[float, int]:
        """As `answers`, of one kind, from those to one batch of them."""
        probe, sample = self.probe, prompts[:batch_size]

        def run(index: int) -> None:
            on = slightly(self.attachment(index)) if with_vector else nullcontext()
            with torch.no_grad(), on:
                generate_answers(
                    probe.models[index],
                    self.tokenizer,
                    sample,
                    max_new_tokens,
                    batch_size,
                    probe.alone,
                )

        seconds, memory = probe.measure(run).at(probe.layers)
        batches = math.ceil(len(prompts) / batch_size)
        return seconds * len(prompts) / len(sample) * self.launch.share(batches), memory


def slightly(attachment: VectorAttachment) -> AbstractContextManager[None]:
    """The vector on with some coefficients."""
    return attachment.applied(
        torch.full((len(attachment.space.names),), 0.1, device=attachment.sharding.device)
    )
