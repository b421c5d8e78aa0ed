"""Which options `safegene completion` offers: those that every command's `--help` lists.

python .ci/completion_words.py    # writes them anew
"""

import io
import json
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path

from safegene_trl.commands.main import COMMANDS, main


WORDS = Path(__file__).resolve().parents[1] / "safegene_trl" / "commands" / "completion_words.json"
# named in the text of a help, and none of the parser's
OF_THE_TEXT = {"--config", "--accelerate_config", "--num_processes"}


def words() -> dict[str, list[str]]:
    """The options of every command, in the order of its help."""
    os.environ["COLUMNS"] = "1000"  # no option is cut in two
    return {name: options_of(name) for name in COMMANDS}


def options_of(name: str) -> list[str]:
    help_ = io.StringIO()
    with redirect_stdout(help_), suppress(SystemExit):
        main([name, "--help"])
    listed = re.findall(r"^\s+(?:-h, )?(--[A-Za-z][\w.]*)", help_.getvalue(), re.MULTILINE)
    told = [word for word in re.findall(r"--[a-z_]+", help_.getvalue()) if word in OF_THE_TEXT]
    return list(dict.fromkeys([*listed, *told]))


if __name__ == "__main__":
    WORDS.write_text(json.dumps(words(), indent=1) + "\n", encoding="utf-8")
