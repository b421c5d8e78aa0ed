"""Measuring what a model answers."""
