"""Model cards, through `huggingface_hub`."""

from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData


if TYPE_CHECKING:
    from ..vector import SafetyVector


def vector_card(vector: "SafetyVector") -> ModelCard:
    """Card of a safety vector: what it is, what it was made from, how it must not be used."""
    data = ModelCardData(
        base_model=vector.aligned_model["name"],
        base_model_relation="adapter",
        library_name="peft",
        tags=["safegene-trl", "safety-vector", "lora"],
    )
    harmful = sum(row["kind"] == "harmful" for row in vector.prompts)
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# Safety vector for {vector.aligned_model["name"]}

Low-rank weight deltas (rank {vector.rank}) in layers {", ".join(map(str, vector.layers))} of `{vector.family.architecture}`,
pointing from a mildly degraded model to the aligned one. A fine-tune of the same family takes them on with a few learned
coefficients, one per layer:

```python
from safegene_trl import SafeGeneCallback, SafeGeneConfig

callback = SafeGeneCallback(SafeGeneConfig(vector="path/or/hub-id"))  # for SFTTrainer or Trainer
```

- Made by: `{vector.extraction["method"]}`; layers selected by `{vector.selection["method"]}`.
- Comes with {harmful} harmful prompts and the aligned model's own refusals. It holds no harmful answers. Answers to benign
  prompts are the aligned model's own too: they mark behaviour and are not meant as facts.
- Files, hashes and scores: `safegene_config.json`.

## Limits

It restores refusals that a fine-tune of *this* family has weakened, as far as the prompts it was made from cover them. It
does not make a model safe against determined attacks. Subtracting it would remove refusals: coefficients are never
negative in `safegene-trl`, and it must not be used that way elsewhere.
"""
    )
