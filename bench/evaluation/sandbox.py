"""Runs a program that a model wrote: a process with little time and memory, an empty folder, and no way to make others.

It keeps accidents in. It is no wall against a program that means harm: such a one may read what its user may read, and
use the network, if there is one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

_SECONDS = 5
_BYTES = 1 << 30
_FILE_BYTES = 1 << 20

# Limits are set by the process itself: between fork and exec, in a process with threads, only little may be done.
_LIMITED = """
import resource, sys
for what, most in ((resource.RLIMIT_AS, {memory}), (resource.RLIMIT_CPU, {seconds}), (resource.RLIMIT_FSIZE, {file}),
                   (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (most, most))
program = sys.stdin.read()
sys.stdin.close()
import builtins, os
for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "kill", "killpg"):
    if hasattr(os, name):
        setattr(os, name, None)
exec(compile(program, "answer", "exec"), {{"__name__": "__main__"}})
print("{passed}", file=sys.__stdout__)
"""


def passes(program: str, seconds: int = _SECONDS, memory: int = _BYTES) -> bool:
    """Whether it comes to its end. Its processes have ended when this returns."""
    passed = secrets.token_hex()  # nothing that the program would say by itself
    limited = _LIMITED.format(memory=memory, seconds=seconds, file=_FILE_BYTES, passed=passed)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", limited], cwd=folder, env={"PATH": os.defpath}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            shown, _ = process.communicate(program, timeout=seconds + 1)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    return process.returncode == 0 and shown.endswith(f"{passed}\n")
