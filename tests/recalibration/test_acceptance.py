"""What is said against coefficients shows the difference that speaks against them."""

import re

import pytest

from safegene_trl.recalibration.acceptance import objection
from safegene_trl.recalibration.objective import Losses


BEFORE = Losses(safety=0.0042, benign=0.5, utility=0.0)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Losses(safety=0.0044, benign=0.5, utility=0.0), "from 0.0042 to 0.0044 nats"),
        (Losses(safety=0.0042, benign=0.5, utility=0.0), "from 0.004 to 0.004 nats"),
        (Losses(safety=1.5, benign=0.5, utility=0.0), "from 0.004 to 1.500 nats"),
        (
            Losses(safety=0.001, benign=0.5, utility=0.00012),
            "is 0.00012 nats and the budget 0.0001",
        ),
        (Losses(safety=0.001, benign=0.50021, utility=0.0), "from 0.5000 to 0.5002 nats"),
    ],
)
def test_numbers_that_differ_are_written_differently(after, said):
    assert re.search(re.escape(said), objection(BEFORE, after, 0.0001))


def test_nothing_speaks_against_what_is_better_within_the_budget():
    assert not objection(BEFORE, Losses(safety=0.0041, benign=0.5, utility=0.0001), 0.0001)
