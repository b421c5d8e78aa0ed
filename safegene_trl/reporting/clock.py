"""How long a run's phases take, and how much memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


_PROCESS = Path("/proc/self")


class PhaseClock:
    """Wall-clock seconds and peak memory (MiB) of each phase of a run."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block as (a further) part of phase `name`: accelerator memory where there is
        one, else the process's resident peak.
        """
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                _PROCESS.joinpath("clear_refs").write_text("5")  # forgets the resident peak so far
        started = time.perf_counter()
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes()
            before = self.phases.get(name, {"seconds": 0.0, "peak_memory_mib": 0.0})
            self.phases[name] = {
                "seconds": round(before["seconds"] + time.perf_counter() - started, 3),
                "peak_memory_mib": max(before["peak_memory_mib"], round(peak / 2**20, 1)),
            }


def _peak_resident_bytes() -> int:
    """On Linux by the process itself: `getrusage` counts what its parent held when it started it."""
    with suppress(OSError, StopIteration):
        lines = _PROCESS.joinpath("status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
