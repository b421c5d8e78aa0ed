"""What no coefficient is fitted on: prompts and task samples to measure on before and after, and
what the aligned model does with the prompts, as far as that is known.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config.gate import GateConfig
from ..config.settings import SafeGeneConfig
from ..errors import CalibrationDataError
from ..judges import Exchange, judged
from ..judges.refusal_phrases import RefusalPhrases
from ..models.inputs import Sample
from ..models.reasoning import Answering, room_to_reason, split_stored
from ..provenance import chat_template_hash
from ..vectors.prompt_rows import ANSWER_TOKENS, MEASURE, Verdict, rows_of
from ..vectors.record import extractions, refuses_as_another
from ..vectors.safety_vector import SafetyVector
from .prompts import Kind, Prompt, kept_apart, near_duplicates, read_prompts, spread
from .row_names import row_name
from .rows import Row, Skipped, UnreadableRowError, conversation
from .training_samples import templated


REPEATED = "text that repeats, or nearly repeats, a prompt that was used"
TOO_LONG = "more tokens than the model's context leaves room to answer"


@dataclass(frozen=True)
class Unseen:
    """What no coefficient is fitted on.

    Attributes:
        prompts: `harmful` and `benign` ones, for answers.
        task: Samples for token accuracy.
        answering: How those answers are asked for.
        verdicts: By kind what the aligned model does with each of the prompts, None where that is
            not known.
        from_vector: Kinds of prompts that come with the vector, and not from the user's data.
    """

    prompts: dict[str, list[Prompt]]
    task: list[Sample]
    answering: Answering = field(default_factory=Answering)
    verdicts: dict[str, list[Verdict | None]] = field(default_factory=dict)
    from_vector: frozenset[str] = frozenset()

    @property
    def categories(self) -> dict[str, int]:
        """How many of the harmful prompts are of each category."""
        named = [prompt.category for prompt in self.prompts["harmful"]]
        return dict(Counter(category for category in named if category is not None))

    @property
    def counts(self) -> dict[str, int]:
        return {
            **{kind: len(prompts) for kind, prompts in self.prompts.items()},
            "task": len(self.task),
        }


class GatePrompts:
    """Prompts to measure on, each short enough for the model to answer, and what was left out of
    each kind.
    """

    def __init__(
        self,
        config: SafeGeneConfig,
        vector: SafetyVector,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        answering: Answering,
    ):
        self.settings = config.gate or GateConfig()
        self.skipped: dict[str, Skipped] = {}
        self.verdicts: dict[str, list[Verdict | None]] = {}
        self.from_vector: set[str] = set()
        self._config, self._tokenizer, self._context = config, tokenizer, context
        self._answering = answering
        self._new_tokens = config.measure.max_new_tokens
        self._tests = rows_of(vector.prompts, "measure")
        self._shipped: set[str] = set()  # kinds that are measured on the vector's prompts for that
        self._same_prompts = vector.family.chat_template == chat_template_hash(tokenizer) and all(
            dict(made.get("chat_template_kwargs", {})) == dict(answering.style.options)
            for made in extractions(vector.extraction)
        )
        self._asked = vector.selection.get("test_prompts") or {}
        self._vector = vector
        self._others_refusals = refuses_as_another(vector.extraction)
        self._unknown = False  # whether such a refusal is measured on
        self._longer = False  # whether more tokens are asked for than the vector's answers have

    @cached_property
    def _stored_tokens(self) -> int:
        """Tokens of the vector's answers: none was cut before these."""
        answers = [row["response"] for row in self._vector.prompts if "response" in row]
        return max([ANSWER_TOKENS, *(len(self._ids(text)) for text in answers)])

    def _ids(self, response: str) -> list[int]:
        text = split_stored(response).answer
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def _same_lengths(self) -> bool:
        """Whether the aligned model's answers to the vector's prompts to measure on were as long as
        answers are here.
        """
        return (
            self._asked.get("max_new_tokens") == self._new_tokens
            and self._asked.get("max_reasoning_tokens") == self._answering.max_reasoning_tokens
        )

    @property
    def warnings(self) -> list[str]:
        """A sentence where the vector's prompts are measured on, and its verdicts on them are of
        answers of another length, or to prompts that were written otherwise.
        """
        if self._unknown:
            return [
                "The vector was carried over from another model and its refusals are that model's: what its aligned model does with the "
                "harmful prompts is not known, so that nothing is measured against it."
            ]
        if self._longer:
            return [
                f"The vector's answers have up to {self._stored_tokens} tokens and here there are {self._new_tokens}, so that nothing is "
                f"measured against the aligned model: set `measure.max_new_tokens` to {self._stored_tokens} or less."
            ]
        if self._shipped and not self._same_prompts:
            return [
                "The aligned model was asked the vector's prompts to measure on in another chat template, or with other arguments for "
                "it, so that nothing is measured against it: write prompts as the vector was made with, or make it again."
            ]
        if not self._shipped or self._same_lengths:
            return []
        asked, thought = (self._asked[f"max_{what}_tokens"] for what in ("new", "reasoning"))
        return [
            f"The aligned model was asked the vector's prompts to measure on with {asked} tokens for an answer and {thought} for the "
            f"reasoning, and here there are {self._new_tokens} and {self._answering.max_reasoning_tokens}, so that nothing is measured "
            f"against it: set `measure.max_new_tokens` to {asked} and `measure.max_reasoning_tokens` to {thought}."
        ]

    def record(self, unseen: Unseen, harmful: str, task: str) -> dict[str, Any]:
        """Of every kind that is measured on: its source, how many, and what was left out."""
        sources = {
            "harmful": self.settings.harmful_data or harmful,
            "benign": self.settings.benign_data or "vector",
            "task": task,
        }
        sources |= dict.fromkeys(self._shipped, "vector")
        return {
            kind: {
                "source": source,
                **({"use": MEASURE} if kind in self._shipped else {}),
                "count": unseen.counts[kind],
                **skips(self.skipped.get(kind, Skipped())),
            }
            for kind, source in sources.items()
        }

    def of(self, kind: Kind, used: Sequence[Row], left: Sequence[Row]) -> list[Prompt]:
        """Prompts of the data that the gate names, else the vector's prompts to measure on, those
        near a used one left out of both; else what the shots' data has left.

        Raises:
            CalibrationDataError: The gate names data, and none of its prompts can be used.
        """
        limit, settings = self._config.measure.num_test_prompts, self.settings
        source = settings.harmful_data if kind == "harmful" else settings.benign_data
        skipped = self.skipped[kind] = Skipped()
        texts = [conversation(row)[0][-1]["content"] for row in used]
        if source is not None and limit:
            prompts = self._named(kind, source, texts, skipped)
            self.verdicts[kind] = [None] * len(prompts)
            return prompts
        known: dict[str, Verdict | None]
        own_data = self._config.data.safety_data if kind == "harmful" else None
        prompts = self._answerable(self._shipped_prompts(kind, texts, skipped), limit, skipped)
        if prompts:
            self._shipped.add(kind)
            alike = self._same_prompts and self._same_lengths
            own = [row for row in self._tests if row["kind"] == kind]
            known = {row["prompt"]: row["verdict"] if alike else None for row in own}
        else:
            prompts = self._answerable([_prompt(row, kind) for row in left], limit, skipped)
            known = {_prompt(row, kind).text: self._verdict(row) for row in left}
        if kind in self._shipped or own_data is None:
            self.from_vector.add(kind)
        self.verdicts[kind] = [known[prompt.text] for prompt in prompts]
        return prompts

    def _named(
        self, kind: Kind, source: str, used: Sequence[str], skipped: Skipped
    ) -> list[Prompt]:
        """Prompts of the data that the gate names."""
        limit, settings = self._config.measure.num_test_prompts, self.settings
        split = settings.harmful_data_split if kind == "harmful" else settings.benign_data_split
        prompts, unread = read_prompts(source, kind, split, None, self._config.seed)
        skipped.update(unread)
        prompts = self._answerable(
            spread(prompts, len(prompts), self._config.seed), 2 * limit, skipped
        )
        if not prompts:
            raise CalibrationDataError(
                f"No prompt of {source} can be answered{skipped}: name other prompts."
            )
        kept = kept_apart(prompts, used)[0]
        if repeated := len(prompts) - len(kept):
            skipped[REPEATED] = repeated
        if len(kept) < min(limit, len(prompts) / 2):
            raise CalibrationDataError(
                f"{repeated} of {len(prompts)} prompts of {source} repeat, or nearly repeat, prompts that the coefficients are "
                f"fitted on or that come with the vector: name other prompts for the gate."
            )
        return kept[:limit]

    def _shipped_prompts(self, kind: Kind, used: Sequence[str], skipped: Skipped) -> list[Prompt]:
        """The vector's prompts to measure on, in seeded order and taken in turn from their
        categories.
        """
        prompts = [_prompt(row, kind) for row in self._tests if row["kind"] == kind]
        repeated = near_duplicates([prompt.text for prompt in prompts], used)
        if repeated:
            skipped[REPEATED] = len(repeated)
        apart = [prompt for index, prompt in enumerate(prompts) if index not in repeated]
        return spread(apart, len(apart), self._config.seed)

    def _verdict(self, row: Row) -> Verdict | None:
        """What the aligned model does with a prompt whose answer comes with the vector, as an answer
        of as many tokens as here would be judged; None for prompts of another source.
        """
        verdict: Verdict | None = row["verdict"]
        if verdict is None or not self._same_prompts:
            return None
        if self._others_refusals and verdict == "refused":  # the aligned model may answer
            self._unknown = True
            return None
        if self._new_tokens > self._stored_tokens:  # it may be refused later
            self._longer = True
            return None
        ids = self._ids(row["response"])[: self._new_tokens]
        said = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        exchange = Exchange(conversation(row)[0][-1]["content"], said)
        label = judged(RefusalPhrases(), [exchange])[0].label
        return label if label == "refused" or label == "answered" else verdict

    def _answerable(self, prompts: Sequence[Prompt], count: int, skipped: Skipped) -> list[Prompt]:
        """The first `count` prompts that the template accepts and the model has room to answer.

        Raises:
            ConfigError: It would have room for some if it had less to reason.
        """
        left: list[Prompt] = []
        room = 0  # for reasoning, after the shortest of the prompts that are too long with it
        for prompt in prompts:
            if len(left) == count:
                break
            try:
                sample = templated(
                    self._tokenizer, list(prompt.messages), "", self._answering.style
                )
                length = sum(not said for said in sample.is_response)
                spare = room_to_reason(length, self._context, self._new_tokens)
                if spare < self._answering.max_reasoning_tokens:
                    room = max(room, int(spare))
                    raise UnreadableRowError(TOO_LONG)
            except UnreadableRowError as error:
                skipped.add(error)
                continue
            left.append(prompt)
        if room and not left and self._context is not None:
            setting = "measure.max_reasoning_tokens"
            raise self._answering.no_room(room, self._context, setting, "test prompt")
        return left


def _prompt(row: Row, kind: Kind) -> Prompt:
    category = row_name(row.get("category"))
    return Prompt("calibration", kind, category, tuple(conversation(row)[0]))


def skips(skipped: Skipped) -> dict[str, dict[str, int]]:
    """For a record: what was left out, by reason; empty where nothing was."""
    return {"skipped": dict(skipped)} if skipped else {}
