"""Mutants of the safety step: what it keeps, reports, compares and refuses."""

from .files import FAULTS, LONG_FAULTS
from .mutant import Edit, Mutant, simple


_TESTS = ("tests/test_callback.py", "tests/step", FAULTS)


def _step(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(f"step: {name}", (Edit(file, old, new),), _TESTS, (LONG_FAULTS,))


STEP = (
    _step(
        "the fine-tune is not on disk first",
        "step/run.py",
        "plan.report.fine_tune = str(fine_tune.keep())",
        "pass",
    ),
    _step(
        "interruptions are not reported",
        "step/run.py",
        "says what it was at\n        _write_failure(plan, error)\n",
        "says what it was at\n",
    ),
    _step(
        "interruptions are swallowed",
        "step/run.py",
        "says what it was at\n        _write_failure(plan, error)\n        raise",
        "says what it was at\n        _write_failure(plan, error)",
    ),
    simple(
        "interruption: SIGTERM ends the process at once",
        "interruption.py",
        "        signal.signal(number, end)",
        "        pass",
        "tests/commands/test_main.py",
    ),
    _step("unexpected errors stay raw", "step/run.py", "raise failure from error", "raise"),
    _step(
        "hashes of other files",
        "step/run.py",
        "dict(zip(unread, read, strict=True))",
        "dict(zip(unread, read[::-1], strict=True))",
    ),
    _step(
        "rejected checkpoints are written",
        "step/run.py",
        "if rejected and not (plan.config.gate and plan.config.gate.write_rejected):",
        "if False:",
    ),
    _step(
        "what was written is not compared",
        "step/probe.py",
        "if not distance <= tolerance * size:",
        "if False:",
    ),
    _step(
        "the rounding is not looked at",
        "step/live_fine_tune.py",
        "if self._merges_live and any(bool(value.any()) for value in changes):",
        "if False:",
    ),
    _step(
        "a model with more than its weights passes",
        "step/preparation.py",
        "if not distance <= RELOADED_TOLERANCE * max(1.0, float(here.abs().max())):",
        "if False:",
    ),
    _step(
        "what was written is not loaded",
        "step/live_fine_tune.py",
        'return {"reloaded": probe.distance(',
        'return {"reloaded": 0.0 and probe.distance(',
    ),
    _step(
        "a callback added in mid-training works",
        "callback.py",
        "        if not self._begun:\n",
        "        if False:\n",
    ),
    simple(
        "callback: it stands where it was added",
        "callback.py",
        "key=lambda each: (_is_tracker(each), each is self)",
        "key=lambda each: 0",
        "tests/test_trackers.py",
        "tests/test_callback.py",
    ),
    _step(
        "coefficients that change nothing are added",
        "step/stored_fine_tune.py",
        "if any(abs(value - carried[name]) > ROUNDING for name, value in coefficients.items()):",
        "if True:",
    ),
    _step(
        "a gate beside given coefficients is forgotten",
        "step/apply_with_coefficients.py",
        "if config.gate and config.gate.names:",
        "if False:",
    ),
    simple(
        "a quantised base is merged as it is",
        "step/live_fine_tune.py",
        "return self.plan.merges and self.quantized is None",
        "return self.plan.merges",
        "tests/step/test_quantized_step.py",
    ),
    simple(
        "any model is the base of a quantised one",
        "checkpoints/quantized_base.py",
        "            if not alike:\n",
        "            if False:\n",
        "tests/checkpoints/test_quantized_base.py",
    ),
    simple(
        "a quantised base's files may change while it is trained",
        "step/quantized_step.py",
        "if _identities(self.base) != self._seen:",
        "if False:",
        "tests/step/test_quantized_step.py",
    ),
    simple(
        "what was merged into a 16-bit base is not read back",
        "checkpoints/stored_merge.py",
        "not torch.equal(_bits(meant), _bits(there))",
        "False",
        "tests/checkpoints/test_quantized_base.py",
    ),
    simple(
        "a pass lays 4-bit weights out anew",
        "models/quantized.py",
        "setattr(layer, _LAYS_OUT_ANEW, False)",
        "pass",
        "tests/models/test_quantized.py",
    ),
)
