"""Every process that a test starts is waited for with a time-out: one that hangs must fail its
test, not the whole run.
"""

import ast
from pathlib import Path


TESTS = Path(__file__).parent
RUNS = {"run", "call", "check_call", "check_output"}
WAITS = {"communicate", "wait"}


def unbounded(text: str) -> list[int]:
    """Lines on which a process is run or waited for without a time-out."""
    found = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute):
            continue
        owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
        runs = owner == "subprocess" and call.func.attr in RUNS
        waits = call.func.attr in WAITS and owner not in ("self", "os") and not call.args
        if (runs or waits) and not any(word.arg in ("timeout", None) for word in call.keywords):
            found.append(call.lineno)
    return found


def test_a_run_without_a_time_out_is_seen():
    text = "subprocess.run(x)\nsubprocess.run(x, timeout=3)\np.communicate()\np.wait(3)\nsubprocess.check_output(x, text=True)"
    assert unbounded(text) == [1, 3, 5]


def test_every_process_has_a_time_out():
    files = sorted(TESTS.rglob("*.py"))
    found = {
        str(path.relative_to(TESTS)): lines
        for path in files
        if (lines := unbounded(path.read_text()))
    }
    assert len(files) > 50 and not found
