"""What a command will take, told before anything of it runs: seconds, peak memory and disk of each
of its steps.

The prompts, batches and ranks of the real run are counted, and every step is run once on a small
likeness of the model (`probe.py`), so that no speed has to be known.
"""
