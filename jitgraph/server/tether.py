"""Runs a command that must not outlive its parent: ``python -I -S tether.py PARENT_PID COMMAND...``.

The whole of a short-lived program: it asks the kernel to kill this process when the thread that started it ends, makes
sure that this has not happened yet, and becomes the command, which inherits the wish. So not even a command that hangs
while it starts can be left behind. Standard library only; nothing of this project is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_FOUND = 127
"""Exit status where there is no such command, as shells have it."""


def main(arguments: list[str]) -> int:
    """Becomes the command; returns only where it cannot."""
    parent, command = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the wish was made
        return 1
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
