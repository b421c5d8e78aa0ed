"""How a model of a given size is trained, and read, on the machine that is there: what `safegene init`
chooses.
"""

from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..estimation.cost import Launch
from ..estimation.training import AROUND, ModelSizes, training_bytes


SMALL = 5 * 10**8  # parameters up to which a CPU does where there is no GPU
ASSUMED_GPU = 80 * 2**30  # bytes, where none is there
MOST_GPUS = 64
SAMPLES = 16  # of an optimizer step
DEGRADING_SAMPLES = 8
_USABLE = 0.9  # of a GPU's memory; the rest is lost in pieces
_READING = 1.1  # of the weights: what answers and gradients by coefficients take beside them
_FOUR_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """Where a recipe is to run.

    Attributes:
        gpus: How many GPUs there are; 0 for a CPU.
        memory: Bytes of each.
        assumed: Whether nobody said so and none was found.
    """

    gpus: int
    memory: int
    assumed: bool = False

    def holds(self, needed: int) -> bool:
        """Whether one GPU has room for this many bytes."""
        return not self.gpus or needed <= _USABLE * self.memory


@dataclass(frozen=True)
class Training:
    """One LoRA training.

    Attributes:
        rank: The LoRA's.
        samples: In a batch of one process.
        accumulation: Batches of an optimizer step.
        length: Tokens of a sample, at most.
        memory: Bytes that one process holds, about.
    """

    rank: int
    samples: int
    accumulation: int
    length: int
    memory: int


@dataclass(frozen=True)
class Plan:
    """How a family's vector is made and taken on.

    Attributes:
        cpu: Whether no GPU is meant.
        four_bit: Whether the base is held in 4 bits while it is trained on (QLoRA).
        launch: Of the trainings.
        fine_tune: The training that takes the vector on.
        degrading: The training before the vector is made.
        reading: Launch of what answers prompts with the 16-bit model: `extract`, `apply`.
        reading_memory: Bytes that one of its processes holds, at least.
    """

    cpu: bool
    four_bit: bool
    launch: Launch
    fine_tune: Training
    degrading: Training
    reading: Launch
    reading_memory: int

    @property
    def dtype(self) -> str:
        """Of the weights that are loaded."""
        return "float32" if self.cpu else "bfloat16"

    @property
    def method(self) -> str:
        """What people call it."""
        return "QLoRA" if self.four_bit else "LoRA"


def in_words(count: int) -> str:
    """A number of parameters, about: `1.54 billion`, `135 million`, `33,520`."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:,}"


def plan_for(name: str, sizes: ModelSizes, is_mixture: bool, machine: Machine) -> Plan:
    """The first of these that fits: a LoRA on one GPU, or the weights shared out over those that are
    there, a LoRA on a base in 4 bits, and the weights shared out over more GPUs.

    Args:
        name: The model's, for messages.
        sizes: The model's.
        is_mixture: Whether it has experts, which are not held in 4 bits.
        machine: Where it is to run.

    Raises:
        ConfigError: None fits.
    """
    if not machine.gpus:
        return _on_cpu(sizes)
    whole = Launch(machine.gpus)
    tried = [(whole, False)]
    if machine.gpus > 1:
        tried.append((Launch(machine.gpus, True), False))
    if not is_mixture:
        tried.append((whole, True))
    more, count = [], 2
    while count <= MOST_GPUS:
        more += [(Launch(count, True), False)] if count > machine.gpus else []
        count *= 2
    for launch, four_bit in (*tried, *more):
        for samples in (4, 2, 1):
            fine_tune = _training(sizes, samples, 2048, SAMPLES, launch, four_bit)
            if machine.holds(fine_tune.memory):
                few = min(DEGRADING_SAMPLES, 4 * samples)
                degrading = _training(sizes, few, 512, DEGRADING_SAMPLES, launch, four_bit)
                reading, held = _reading(sizes, machine)
                return Plan(False, four_bit, launch, fine_tune, degrading, reading, held)
    raise ConfigError(
        f"{name} has {in_words(sizes.parameters)} parameters, and {MOST_GPUS} GPUs of {machine.memory / 2**30:.3g} GiB do not "
        "hold its training: set `--gpu_memory` to larger ones, or name a smaller model."
    )


def _training(
    sizes: ModelSizes, samples: int, length: int, step: int, launch: Launch, four_bit: bool
) -> Training:
    accumulation = max(1, step // (samples * launch.processes))
    memory = training_bytes(sizes, 16, samples * length, 2, launch, four_bit)
    return Training(16, samples, accumulation, length, memory)


def _reading(sizes: ModelSizes, machine: Machine) -> tuple[Launch, int]:
    """How the whole model in 16 bits is read, and what a process holds."""
    launch = Launch()
    while True:
        held = AROUND + int(_READING * launch.held(sizes.weights(2), 2))
        if machine.holds(held) or launch.processes >= MOST_GPUS:
            return launch, held
        launch = replace(launch, processes=2 * launch.processes, sharded=True)


def _on_cpu(sizes: ModelSizes) -> Plan:
    """As the recipe of SmolLM2-135M: short samples in float32, nothing recomputed."""

    def training(samples: int) -> Training:
        tokens = samples * 256
        memory = training_bytes(sizes, 8, tokens, _FOUR_BYTES, checkpointing=False)
        return Training(8, samples, 1, 256, memory)

    held = AROUND + int(_READING * sizes.weights(_FOUR_BYTES))
    return Plan(True, False, Launch(), training(4), training(8), Launch(), held)
