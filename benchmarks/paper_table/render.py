from pathlib import Path


CELLS = Path(__file__).resolve().parents[1] / "results" / "paper_table"


def render(cells: Path) -> None: ...
