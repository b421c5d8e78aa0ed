"""What an evaluation's folder holds."""

GENERATIONS, VERDICTS, RESULT, SETTINGS = (
    "generations.jsonl",
    "verdicts.jsonl",
    "evaluation.json",
    "settings.json",
)
