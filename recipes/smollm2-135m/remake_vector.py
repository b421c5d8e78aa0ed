"""Makes the shipped safety vector again, from the aligned model on, and says how near it came.

    python recipes/smollm2-135m/remake_vector.py

What is done already is not done again: steps lie in `build/smollm2-135m/`. On the processor that
made the shipped vector the weights should be the same. Another one adds floating-point numbers in
another order; then every component's cosine with the shipped one must still be at least COSINE, or
the command ends with 1.
"""

import subprocess
import sys
from pathlib import Path

import torch

from safegene_trl import SafetyVector


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = Path("build") / "smollm2-135m"
RECIPES = Path("recipes") / "smollm2-135m"
COSINE = 0.95
COMPONENTS = ("puzzles", "released", "openings")


def main() -> int:
    run(sys.executable, RECIPES / "prepare.py")
    safegene(BUILD / "puzzles", "sft", "--config", RECIPES / "degrade.yaml")
    safegene(BUILD / "openings", "sft", "--config", RECIPES / "degrade_openings.yaml")
    for name in COMPONENTS:
        place = BUILD / "vectors" / name
        words = ["--degraded_model", BUILD / name, "--output_dir", place]
        safegene(place, "extract", "--config", RECIPES / "extract.yaml", *words)
    combined, made = BUILD / "vectors" / "combined", BUILD / "safety-vector"
    parts = [BUILD / "vectors" / name for name in COMPONENTS]
    safegene(combined, "combine", *parts, "--output_dir", combined)
    safegene(made, "extract", "--config", RECIPES / "retarget.yaml", "--vector", combined)
    return compared(ROOT / made, HERE / "safety-vector")


def safegene(made: Path, *words: object) -> None:
    """A command, unless what it makes is there."""
    if not (ROOT / made).exists():
        run(sys.executable, "-m", "safegene_trl", *words)


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


def compared(made: Path, shipped: Path) -> int:
    """Prints how the two differ; 0 where every component is near enough."""
    one, other = (SafetyVector.from_pretrained(str(place)) for place in (made, shipped))
    near = True
    first = 0
    for name, rank in zip(COMPONENTS, other.extraction["components"], strict=True):
        part = slice(first, first + rank)
        first += rank
        cosine, distance = _apart(one, other, part)
        near &= cosine >= COSINE
        print(f"{name}: cosine {cosine:.6f}, relative difference {distance:.2e}")
    verdicts = [
        {(row["kind"], row["prompt"]): row.get("verdict") for row in vector.prompts}
        for vector in (one, other)
    ]
    again = [key for key in verdicts[1] if key in verdicts[0]]
    same = sum(verdicts[0][key] == verdicts[1][key] for key in again)
    print(
        f"{len(again)} of {len(verdicts[1])} prompts are there again, {same} with the same verdict"
    )
    print("the same, within the tolerance" if near else f"further apart than a cosine of {COSINE}")
    return 0 if near else 1


def _apart(one: SafetyVector, other: SafetyVector, part: slice) -> tuple[float, float]:
    """Cosine and relative distance of one component's weight deltas."""
    inner = mine = theirs = 0.0
    for name, delta in other.deltas.items():
        first, second = (
            found.b[:, part].double() @ found.a[part].double()
            for found in (one.deltas[name], delta)
        )
        inner += float((first * second).sum())
        mine, theirs = mine + float(first.square().sum()), theirs + float(second.square().sum())
    distance = max(mine + theirs - 2 * inner, 0.0)
    return inner / (mine * theirs) ** 0.5, (distance / theirs) ** 0.5


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main())
