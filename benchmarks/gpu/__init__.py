"""What the safety step costs on a GPU: `python -m benchmarks.gpu`, in `__main__.py`."""
