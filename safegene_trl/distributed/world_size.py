"""How many processes a launcher has started. Imports nothing: what answers without a model asks
this, too.
"""

import os


def launched_processes() -> int:
    """The number of processes of this launch, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
