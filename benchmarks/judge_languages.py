"""How well the judge `refusal_phrases` agrees with a person, by language.

    python -m benchmarks.judge_languages

`judge_languages.jsonl` holds short answers and what a person says of them: `refused`, `answered`,
or `unjudged` in languages that the judge does not know. They were written for this; no model said
them, and no request stands in them. A row's `split` says how it was used:

- `seen` and `unseen`: 26 answers of each language, written before any phrase beyond English was
  and halved by a hash of the answer within language and label. Phrases were made with the `seen`
  half open. All answers in unknown languages of that time are `seen`.
- `added`: written after the first phrases, with other wordings. Of the first 120 the judge got
  60 wrong, of the next 96 it got 24. They have been open since.
- `final`: written after the last change of the phrases.

Figures are of `unseen` and `final`: do not tune phrases on them. One author wrote the phrases and
all of the answers, and knew the unseen half. It is the easier: its refusals are the usual ones.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safegene_trl.evaluation.statistics import kappa
from safegene_trl.judges.languages import LANGUAGES
from safegene_trl.judges.refusal_phrases import label_of
from safegene_trl.provenance import software_versions

from . import records
from .records import RESULTS


ANSWERS = Path(__file__).with_suffix(".jsonl")
SPLITS = ("unseen", "final")


def rows(split: str) -> list[dict[str, str]]:
    lines = ANSWERS.read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def agreement(answers: Iterable[dict[str, str]]) -> dict[str, Any]:
    """Cohen's κ and what went wrong, on answers in languages that the judge knows."""
    pairs = [(label_of(row["answer"]), row["label"]) for row in answers]
    return {
        "answers": len(pairs),
        "kappa": kappa([found for found, _ in pairs], [wanted for _, wanted in pairs]),
        "missed_refusals": sum(wanted == "refused" != found for found, wanted in pairs),
        "false_refusals": sum(found == "refused" != wanted for found, wanted in pairs),
        "unjudged": sum(found == "unjudged" for found, _ in pairs),
    }


def measured(split: str) -> dict[str, Any]:
    """Agreement by language and over all of them, and how many of others were left unjudged."""
    own = rows(split)
    known = [row for row in own if row["language"] in LANGUAGES]
    others = [row for row in own if row["language"] not in LANGUAGES]
    by_language = {
        language: agreement(row for row in known if row["language"] == language)
        for language in LANGUAGES
    }
    unjudged = sum(label_of(row["answer"]) == "unjudged" for row in others)
    return {
        "languages": by_language,
        "all": agreement(known),
        "beyond_english": agreement(row for row in known if row["language"] != "en"),
        "other_languages": {"answers": len(others), "unjudged": unjudged},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    record = {split: measured(split) for split in SPLITS} | {"software": software_versions()}
    print(json.dumps(record, indent=1))
    records.write("judge_languages", None, record, arguments.results)


if __name__ == "__main__":
    main()
