"""Prompt sets for evaluating, and keeping them apart from what a model or vector was made with."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar
from unicodedata import category, normalize

from transformers import PreTrainedTokenizerBase

from ..checkpoints.contents import MARKER
from ..errors import CalibrationDataError, FamilyError
from ..provenance import sha256_of_json, tokenizer_hash
from ..text import read_json
from ..vectors.files import CONFIG_FILE
from ..vectors.safety_vector import SafetyVector
from .row_names import RowNames
from .rows import Row, Skipped, UnreadableRowError, prompt_of
from .sources import draw, load_rows


logger = logging.getLogger(__name__)
Kind = Literal["harmful", "benign"]
T = TypeVar("T")
NEAR = 0.5  # Jaccard index of character 5-grams from which two prompts count as one
GRAM = 5
PLAIN = "The tokenizer of %s has no chat template: prompts go to the model as plain text."


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        set: Name of the prompt set.
        kind: Whether it ought to be refused (`harmful`) or answered (`benign`).
        category: The set's own category, if it has any.
        messages: The conversation up to where the model speaks.
    """

    set: str
    kind: Kind
    category: str | None
    messages: tuple[dict[str, str], ...]

    @property
    def key(self) -> str:
        """Names the prompt in files: a hash of its set and messages."""
        return sha256_of_json([self.set, list(self.messages)])[:16]

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


def load_prompts(source: str, kind: Kind, split: str, limit: int | None, seed: int) -> list[Prompt]:
    """Prompts of a data set (local file or hub id), in any format that `data.safety_data` may have,
    each once.

    Rows without a prompt that can be read are left out, with a warning.

    Args:
        source: The data set. Its name is the file's, or the hub id's last part.
        kind: Which kind of prompts it holds.
        split: Split of a hub data set.
        limit: How many are drawn at random, as evenly over the categories as can be. Default: all.
        seed: For drawing.

    Raises:
        CalibrationDataError: The data cannot be read or has no prompts.
    """
    prompts, skipped = read_prompts(source, kind, split, limit, seed)
    if skipped:
        logger.warning("%d rows of %s are left out%s.", skipped.total(), source, skipped)
    return prompts


def read_prompts(
    source: str, kind: Kind, split: str, limit: int | None, seed: int
) -> tuple[list[Prompt], Skipped]:
    """As `load_prompts`, with the rows that are left out, because they hold no prompt that can be
    read, counted.
    """
    found: dict[str, Prompt] = {}
    skipped, categories = Skipped(), RowNames("category")
    for row in load_rows(source, split):
        try:
            prompt = Prompt(Path(source).stem, kind, None, tuple(prompt_of(row)))
        except UnreadableRowError as error:
            skipped.add(error)
            continue
        try:
            categories.add(prompt.key, row.get("category"))
        except CalibrationDataError as error:
            raise CalibrationDataError(f"{source}: {error}") from None
        found.setdefault(prompt.key, prompt)
    categories.tell(source)
    if not found:
        raise CalibrationDataError(
            f"The data set {source} has no prompt that can be read{skipped}: name another one."
        )
    prompts = [replace(own, category=categories.of.get(key)) for key, own in found.items()]
    return (prompts if limit is None else spread(prompts, limit, seed)), skipped


def spread(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Up to `count` prompts in seeded order, taken in turn from the categories."""
    return in_turn(prompts, count, seed, lambda prompt: prompt.category)


def in_turn(items: Sequence[T], count: int, seed: int, group: Callable[[T], str | None]) -> list[T]:
    """Up to `count` items in seeded order, taken in turn from the groups."""
    groups: dict[str | None, list[T]] = defaultdict(list)
    shuffled: list[T] = draw(items, len(items), seed)
    for item in shuffled:
        groups[group(item)].append(item)
    turns = [(turn, item) for own in groups.values() for turn, item in enumerate(own)]
    return [item for _, item in sorted(turns, key=lambda each: each[0])][:count]


def check_encoding(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: Sequence[Prompt],
    used: Iterable[str] = (),
) -> None:
    """Where a model's tokenizer has no chat template, warns that prompts go to it as plain text, or
    refuses that.

    A base model is asked so. One that was made or safeguarded with a template, and lost it, would
    be measured in words that nobody puts to it.

    Args:
        tokenizer: The model's.
        name: The model's folder or hub id.
        prompts: What it will be asked.
        used: Data sets and safety vectors that it was made with.

    Raises:
        CalibrationDataError: A prompt is more than one turn of the user.
        FamilyError: The model's report, or a vector for the same tokenizer, is of a model with a
            chat template.
    """
    if tokenizer.chat_template:
        return
    remedy = f"save the chat template into {name}"
    if any([message["role"] for message in prompt.messages] != ["user"] for prompt in prompts):
        raise CalibrationDataError(
            f"The tokenizer of {name} has no chat template to tell the turns of a conversation apart: {remedy}, or give "
            "prompts of one user turn."
        )
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # no report of ours
        if read_json((Path(name) / MARKER).read_bytes())["model"]["chat_template"] is not None:
            raise FamilyError(
                f"{name} was safeguarded with a chat template and its tokenizer has none: {remedy}."
            )
    for source in filter(_is_vector, used):
        family = SafetyVector.from_pretrained(source).family
        if family.chat_template is not None and family.tokenizer == tokenizer_hash(tokenizer):
            raise FamilyError(
                f"The safety vector {source} was made with a chat template and the tokenizer of {name} has none: {remedy}, "
                "or, if it is a base model, name data sets in place of the vector."
            )
    logger.warning(PLAIN, name)


def _is_vector(source: str) -> bool:
    return (Path(source) / CONFIG_FILE).is_file()


def prompts_used(sources: Iterable[str], split: str = "train") -> list[str]:
    """Texts of prompts that evaluation must not repeat: those of data sets, or of safety vectors."""
    texts = []
    for source in sources:
        if _is_vector(source):
            texts += [row["prompt"] for row in SafetyVector.from_pretrained(source).prompts]
        else:
            texts += [text for row in load_rows(source, split) for text in _prompt_texts(row)]
    return texts


def _prompt_texts(row: Row) -> list[str]:
    """The row's prompt as a list of one; a row that holds none repeats none."""
    try:
        return [prompt_of(row)[-1]["content"]]
    except UnreadableRowError:
        return []


def near_duplicates(
    texts: Sequence[str], used: Sequence[str], threshold: float = NEAR
) -> dict[int, tuple[str, float]]:
    """Which of `texts` repeat one of `used`, wholly or nearly.

    Compared are the sets of character 5-grams of the lower-case words, by their Jaccard index.

    Returns:
        By index in `texts`: the nearest used text and the index (0–1) with it, from `threshold` on.
    """
    grams = [_grams(text) for text in used]
    holders: dict[str, list[int]] = defaultdict(list)
    for i, own in enumerate(grams):
        for gram in own:
            holders[gram].append(i)
    found = {}
    for position, text in enumerate(texts):
        own = _grams(text)
        shared = Counter(i for gram in own for i in holders.get(gram, ()))
        best = max(
            ((count / (len(own) + len(grams[i]) - count), i) for i, count in shared.items()),
            default=(0.0, 0),
        )
        if best[0] >= threshold:
            found[position] = (used[best[1]], best[0])
    return found


def kept_apart(
    prompts: Sequence[Prompt], used: Sequence[str]
) -> tuple[list[Prompt], list[dict[str, object]]]:
    """The prompts that do not repeat a used one, and a record of those that do.

    Raises:
        CalibrationDataError: None is left of a set.
    """
    repeated = near_duplicates([prompt.text for prompt in prompts], used)
    left = [prompt for i, prompt in enumerate(prompts) if i not in repeated]
    for name in {prompt.set for prompt in prompts} - {prompt.set for prompt in left}:
        raise CalibrationDataError(
            f"Every prompt of {name} repeats one that the model or vector was made with: evaluate on other prompts."
        )
    record: list[dict[str, object]] = [
        {
            "set": prompts[i].set,
            "prompt": prompts[i].text,
            "used": text,
            "similarity": round(similarity, 3),
        }
        for i, (text, similarity) in repeated.items()
    ]
    return left, record


def _grams(text: str) -> set[str]:
    """However the letters are encoded, and whatever invisible characters stand between them."""
    text = "".join(c for c in normalize("NFKC", text) if category(c) != "Cf")
    words = re.findall(r"[^\W_]+", text.lower())
    plain = f" {' '.join(words)} "
    return {plain[i : i + GRAM] for i in range(max(1, len(plain) - GRAM + 1))}
