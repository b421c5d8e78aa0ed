"""The safety step: prepare, search, measure, decide, write, verify, record."""
