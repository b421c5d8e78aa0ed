"""Auditing a safety vector: where it restores refusals, and where it does not."""
