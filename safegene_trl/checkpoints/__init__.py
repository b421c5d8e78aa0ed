"""Checkpoints on disk: folders that appear whole, replace only what is ours, and never harm
another.
"""
