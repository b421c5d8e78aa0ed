"""LLaMA-Factory with the safety step: it takes callbacks from Python, not from its YAML.

    python examples/llamafactory_sft.py train.yaml --vector VECTOR --settings '{"gate": {"min_refusal_rate": 0.8}}'

`train.yaml` is what `llamafactory-cli train` reads. The safeguarded checkpoint goes to
`safeguarded` in its `output_dir`.
"""

import argparse
import json
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from safegene_trl import SafeGeneCallback, SafeGeneConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--vector", required=True)
    parser.add_argument("--settings", default="{}", help="further keys of SafeGeneConfig, as JSON")
    options = parser.parse_args()
    callback = SafeGeneCallback(
        SafeGeneConfig(vector=options.vector, **json.loads(options.settings))
    )
    run_exp(yaml.safe_load(options.recipe.read_text()), callbacks=[callback])


if __name__ == "__main__":
    main()
