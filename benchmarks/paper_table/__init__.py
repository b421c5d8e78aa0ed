"""The paper's table on a model that runs on a laptop: every method, on every fine-tune, on the same
prompts.
"""
