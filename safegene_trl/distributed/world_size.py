"""How many processes a launcher has started, and which this one is. Imports nothing: what answers
without a model asks this, too.
"""

import os


def launched_processes() -> int:
    """The number of processes of this launch, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process of a launch that speaks for all, before they have joined; True
    without a launcher.
    """
    return int(os.environ.get("RANK", "0")) == 0
