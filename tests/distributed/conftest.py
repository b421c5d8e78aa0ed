"""One interpreter for all launches whose ranks need not be started by Python itself."""

import pytest

from .launching import Forked


@pytest.fixture(scope="session")
def forked():
    started = Forked()
    yield started
    started.end()
