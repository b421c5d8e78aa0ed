"""A live model: its weights, what is attached to them, what stands in their place."""
