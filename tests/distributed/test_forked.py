"""What the other tests launch by forks ends as a launch by Python's start would."""

import pytest

from .launching import ranks


SCRIPT = """
import os, sys, time
rank = int(os.environ["RANK"])
sys.stdout.write(f"rank {rank} of {os.environ['WORLD_SIZE']}, {sys.argv[1:]}\\n")
sys.stdout.flush()
if sys.argv[1] == "hang":
    time.sleep(100)
sys.exit(3 * rank if sys.argv[1] == "fail" else 0)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_every_rank_has_the_words_and_its_own_number(forked, script):
    done = forked(ranks(script, "word", "--flag", processes=3))
    assert done.returncode == 0, done.stdout
    for rank in range(3):
        assert f"rank {rank} of 3, ['word', '--flag']" in done.stdout


def test_a_rank_that_fails_fails_the_launch(forked, script):
    done = forked(ranks(script, "fail"))
    assert done.returncode != 0 and "exitcode  : 3" in done.stdout


def test_a_launch_that_hangs_is_ended(forked, script):
    done = forked(ranks(script, "hang"), timeout=8)
    assert done.returncode == -9
