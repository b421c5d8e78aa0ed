"""Rank 0 may work alone for longer than a collective operation may wait, also where there are more
than two ranks.
"""

import pytest

from .launching import ranks


pytestmark = pytest.mark.timeout(200)
RANKS = 3
SCRIPT = """
import sys, time
from datetime import timedelta

import torch
import torch.distributed as dist

from safegene_trl.errors import SafeGeneError
from safegene_trl.distributed.layouts import Sharding

dist.init_process_group("gloo", timeout=timedelta(seconds=1))
job = Sharding(torch.device("cpu"))
with job.on_main_rank() as working:
    if working:
        time.sleep(2.5)
said = "nothing"
try:
    with job.on_main_rank() as working:
        if working:
            raise SafeGeneError("the hub is gone")
except SafeGeneError as error:
    said = str(error)
job.check_same("anything", "the same")
total = int(job.sum(torch.tensor([job.rank])))
sys.stdout.write(f"rank {job.rank} of {job.world_size}, sum {total}: {said}\\n")
dist.destroy_process_group()
"""


def test_the_others_wait_for_rank_0_as_long_as_it_takes(forked, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forked(ranks(str(tmp_path / "script.py"), processes=RANKS), 120)
    assert done.returncode == 0, done.stdout[-4000:]
    for rank in range(RANKS):
        said = "the hub is gone" if rank == 0 else "Rank 0 of 3 failed: the hub is gone"
        assert f"rank {rank} of 3, sum 3: {said}" in done.stdout
