"""How a model is spread over processes, and what is done on all of them together."""
