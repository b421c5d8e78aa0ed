"""Breaks the safety step at chosen points and looks at what is left: `python -m tests.faults
--count 1000 --record FILE`.

`world.py` holds the commands and what is right, `events.py` the points at which a run can be broken
and the ways to break it, `reader.py` a process that looks on, `suite.py` the choice of faults and
the judgement.
"""
