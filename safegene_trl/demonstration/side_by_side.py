"""The models that stand side by side: the aligned one, the fine-tune, and the fine-tune with as much
of the vector on it as a slider says.

Two models are in memory, for the last two are one: the vector is put on by hooks and scaled, as an
audit does it. Of an answer to a harmful prompt nothing leaves this module but its label.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..auditing.config import AuditConfig
from ..auditing.variants import (
    Variant,
    check_entry,
    check_not_folded,
    chosen_coefficients,
    of_fine_tune,
    space_of,
)
from ..checkpoints.folding import fold_adapters
from ..checkpoints.loading import load_placed, load_tokenizer
from ..checkpoints.stored_model import StoredModel
from ..data.prompts import Prompt, check_encoding, spread
from ..distributed.layouts import Sharding
from ..distributed.processes import this_job
from ..errors import ConfigError, SafeGeneError
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluate import generated
from ..judges import Exchange, Judge, judged, load_judge
from ..judges.intervals import Rate
from ..models.parameters import canonical_modules
from ..provenance import model_reference, same_weights
from ..vectors.family import Family
from ..vectors.prompt_rows import rows_of
from ..vectors.safety_vector import SafetyVector
from .config import DemoConfig
from .prompts import Offered, offered
from .release import Release


ROLES = ("aligned", "fine_tune", "safeguarded")
STEPS = 20  # of the slider from 0 to 1
_AT_ONCE = 8  # prompts, after which somebody can have ended the demo


@dataclass(frozen=True)
class Shown:
    """What stands in a column.

    Attributes:
        answer: The model's answer, cut where the settings say.
        label: What the judge says of it.
    """

    answer: str
    label: str


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        name: Its folder or hub id.
        model: The model, its LoRA in its weights.
        tokenizer: Its tokenizer.
        asking: How it is asked.
        sharding: Where it lies.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    asking: EvaluationConfig
    sharding: Sharding


class SideBySide:
    """Up to three models that answer the same prompts.

    Args:
        vector: The vector.
        tuned: The model that it is put on.
        variants: The fine-tune and the safeguarded model, as variants of that.
        aligned: The aligned model; None where it is not there.
        harmful: Harmful prompts, on which refusals are counted.
        notes: What is right but surprising.

    Attributes:
        roles: Of the columns, from the left.
        prompts: What can be asked, by its text.
    """

    def __init__(
        self,
        vector: SafetyVector,
        tuned: Loaded,
        variants: Mapping[str, Variant],
        aligned: Loaded | None,
        harmful: Sequence[Prompt],
        notes: Sequence[str] = (),
    ):
        self.tuned, self.aligned, self.notes = tuned, aligned, list(notes)
        self.roles = ROLES if aligned else ROLES[1:]
        self.prompts: dict[str, Offered] = offered()
        self._vector, self._variants, self._harmful = vector, dict(variants), list(harmful)
        self._judge: Judge = load_judge("refusal_phrases")
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._shown: dict[tuple[str, int, str], Shown] = {}
        self._refused: dict[tuple[str, int], Rate] = {}
        for loaded in filter(None, (tuned, aligned)):
            loaded.model.register_forward_pre_hook(self._check_goes_on)

    @property
    def harmful_count(self) -> int:
        """Harmful prompts that refusals are counted on."""
        return len(self._harmful)

    def answer(self, role: str, prompt: str, slider: float) -> Shown:
        """What a model says to a prompt of the list.

        Args:
            role: One of `roles`.
            prompt: A text in `prompts`.
            slider: How much of the coefficients the safeguarded model has, 0–1.

        Raises:
            ConfigError: The prompt is not on the list, or the slider out of range.
            SafeGeneError: The device is too small, or the demo was ended.
        """
        if prompt not in self.prompts:
            raise ConfigError("This prompt is not on the list: choose one that is.")
        key = (role, _step(role, slider), prompt)
        with self._lock:
            if key not in self._shown:
                (self._shown[key],) = self._asked(*key[:2], [self.prompts[prompt].asked])
            return self._shown[key]

    def refused(self, role: str, slider: float) -> Rate | None:
        """How many of the vector's harmful prompts a model refuses; None where there are none.

        Args:
            role: One of `roles`.
            slider: As in `answer`.

        Raises:
            ConfigError: The slider is out of range.
            SafeGeneError: The device is too small, or the demo was ended.
        """
        key = (role, _step(role, slider))
        if not self._harmful:
            return None
        with self._lock:
            if key not in self._refused:
                found = sum(one.label == "refused" for one in self._asked(*key, self._harmful))
                self._refused[key] = Rate(found, len(self._harmful))
            return self._refused[key]

    def end(self) -> None:
        """Stops whatever is being answered at its next token."""
        self._ended.set()

    def _asked(self, role: str, step: int, prompts: Sequence[Prompt]) -> Iterator[Shown]:
        loaded = self.aligned if role == "aligned" else self.tuned
        assert loaded is not None  # a role of `roles`
        variant = Variant() if role == "aligned" else self._variant(step / STEPS)
        space = space_of(self._vector)
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            with variant.applied(loaded.model, self._vector, space, loaded.sharding):
                found = list(
                    generated(loaded.model, loaded.tokenizer, part, loaded.asking, loaded.sharding)
                )
            for own, replies in found:
                exchanges = [
                    Exchange(prompt.text, reply.answer, finished=reply.finished)
                    for prompt, reply in zip(own, replies, strict=True)
                ]
                verdicts = judged(self._judge, exchanges)
                yield from (
                    Shown(exchange.answer, verdict.label)
                    for exchange, verdict in zip(exchanges, verdicts, strict=True)
                )

    def _variant(self, share: float) -> Variant:
        """The fine-tune with a share of the coefficients: at 0 and 1 the two models as they are."""
        fine_tune, safeguarded = self._variants["fine_tune"], self._variants["safeguarded"]
        if share in (0, 1):
            return safeguarded if share else fine_tune
        held = fine_tune.held or safeguarded.held
        start = held if fine_tune.wanted is None else fine_tune.wanted
        end = held if safeguarded.wanted is None else safeguarded.wanted
        wanted = {name: start[name] + share * (end[name] - start[name]) for name in held}
        return Variant(held, wanted)

    def _check_goes_on(self, *_: Any) -> None:
        if self._ended.is_set():
            raise SafeGeneError("The demo was ended: start it again by `safegene demo`.")


def _step(role: str, slider: float) -> int:
    """The place of a slider's value among its steps; the others do not depend on it."""
    if not 0 <= slider <= 1:
        raise ConfigError(f"The slider is {slider}: it must be from 0 to 1.")
    return {"aligned": STEPS, "fine_tune": 0}.get(role, round(slider * STEPS))


def load_side_by_side(config: DemoConfig) -> SideBySide:
    """Loads the models of a demo; what does not fit is said before that.

    Raises:
        ConfigError: A value is impossible, or a folder is not what it should be.
        VectorError: The vector is missing or damaged.
        FamilyError: Models and vector do not belong together.
        SafeGeneError: A model cannot be loaded.
    """
    config.check()
    release = Release.read(config.release)
    vector = release.open_vector(config.vector)
    asking = config.asking(config.vector or release.vector)
    check_not_folded(asking.model, None)
    check_entry(asking.model, None)
    unsure = release.check_fine_tune(config.model) if config.model and config.safeguarded else []
    chosen = chosen_coefficients(asking, vector)
    stored = StoredModel.open(asking.model).model
    tokenizer = load_tokenizer(asking.model)
    notes = vector.family.check_member(Family.of(stored, tokenizer))
    variants, coefficients, said = of_fine_tune(stored, vector, chosen, asking.model)
    notes += [*unsure, *said, f"Coefficients: {coefficients.source}."]
    harmful, of_what = _harmful_prompts(vector, config.num_prompts)
    check_encoding(tokenizer, asking.model, [*harmful, *(one.asked for one in offered().values())])
    found, why_not = _find_aligned(config, release, vector)
    notes += [*why_not, of_what]
    if release.rejected:
        notes.insert(0, f"This checkpoint was rejected. {release.rejected}")
    del stored
    tuned = _loaded(asking, asking.model, None, vector)
    vector.check_fits(canonical_modules(tuned.model))
    aligned = None if found is None else _loaded(asking, *found, vector)
    return SideBySide(vector, tuned, variants, aligned, harmful, notes)


def _find_aligned(
    config: DemoConfig, release: Release, vector: SafetyVector
) -> tuple[tuple[str, str | None] | None, list[str]]:
    """The aligned model's name and revision, and what is to be said of it.

    Raises:
        FamilyError: One that somebody names is of another family.
    """
    named = config.aligned_model
    if not named:
        found = release.find_aligned(vector, config.fine_tune)
        missing = (
            "The aligned model is not on this machine, so there are two columns: name its folder by `--aligned_model` "
            "to have the third."
        )
        return found, [] if found else [missing]
    stored = StoredModel.open(named)
    notes = vector.family.check_member(Family.of(stored.model, load_tokenizer(named)))
    if not same_weights(model_reference(named), vector.aligned_model):
        notes.append(
            "The aligned model has other weights than the one that the vector was made from."
        )
    return (named, None), notes


def _loaded(asking: AuditConfig, name: str, revision: str | None, vector: SafetyVector) -> Loaded:
    settings = asking.asking(name, revision, vector.extraction.get("chat_template_kwargs", {}))
    model, sharding = load_placed(name, revision, asking.dtype, this_job())
    fold_adapters(model, sharding)
    return Loaded(name, model, load_tokenizer(name, revision), settings, sharding)


def _harmful_prompts(vector: SafetyVector, count: int) -> tuple[list[Prompt], str]:
    """Harmful prompts of the vector, and which they are: those to measure on, where it has any."""
    rows = [row for row in rows_of(vector.prompts, "measure") if row["kind"] == "harmful"]
    said = "Harmful prompts are the vector's own to measure on, which it did not learn from."
    if not rows:
        rows = rows_of(vector.prompts, "harmful")
        said = (
            "Harmful prompts are those that the vector learned from, because it brings none to measure on: what is counted on "
            "them shows what the slider does, and not how well it does it."
        )
    prompts = [
        Prompt(
            "vector", "harmful", row.get("category"), ({"role": "user", "content": row["prompt"]},)
        )
        for row in rows
    ]
    return spread(prompts, count, 0), said
