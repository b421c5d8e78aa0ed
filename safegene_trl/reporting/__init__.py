"""What was done and measured, for machines (JSON) and people (model cards)."""
