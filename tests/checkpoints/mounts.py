"""Mounts for one test: a child process in a mount namespace of its own."""

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable

import pytest


_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_NOT_ALLOWED = 77


def with_mounts(shell: str, act: Callable[[], None]) -> None:
    """Calls `act` after a shell script that mounts; skips the test where this user may not."""
    user = os.getuid()
    child = os.fork()
    if child == 0:
        code = _NOT_ALLOWED
        try:
            if ctypes.CDLL(None).unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)) == 0:
                if user:
                    with open("/proc/self/uid_map", "w") as file:
                        file.write(f"0 {user} 1")
                shell = f"mount --make-rprivate / && {shell}"
                if subprocess.run(["sh", "-c", shell], timeout=30).returncode == 0:
                    code = 1
                    act()
                    code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _NOT_ALLOWED:
        pytest.skip("no mounts for this user")
    assert code == 0
