"""Runs a command that must not outlive its parent: ``python -I -S tether.py PARENT_PID --socket=PATH COMMAND...``.

The whole of a short-lived program: it asks the kernel to kill this process when the thread that started it ends, makes
sure that this has not happened yet, and becomes the command, which inherits the wish. So not even a command that hangs
while it starts can be left behind. A process that is killed cannot tidy up, so a second one, which only waits for that,
takes the file of its socket away; an empty PATH needs none. Standard library only; nothing of this project is
imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import sys

PR_SET_PDEATHSIG = 1
SOCKET = "--socket"
NOT_FOUND = 127
"""Exit status where there is no such command, as shells have it."""


def main(arguments: list[str]) -> int:
    """Becomes the command; returns only where it cannot."""
    parent, (option, _, path), command = int(arguments[0]), arguments[1].partition("="), arguments[2:]
    if option != SOCKET:
        print("whoever started this is of another version: start it again", file=sys.stderr)
        return NOT_FOUND
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the wish was made
        return 1
    if path:
        leave_caretaker(path)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


def leave_caretaker(path: str) -> None:
    """Forks a process that removes the socket at ``path`` once this one, or what it has become, has ended. The end of a
    pipe that it never writes to tells."""
    waits, lives = os.pipe()
    os.set_inheritable(lives, True)
    if os.fork():
        os.close(waits)
        return
    os.close(lives)
    for stream in range(3):  # whoever reads the command's output must see its end
        os.close(stream)
    os.read(waits, 1)
    remove_dead(path)
    os._exit(0)


def remove_dead(path: str) -> None:
    """Removes a socket's file, unless somebody listens there again. Nothing that is no socket is ever removed: whoever
    connects to any other file is refused as well."""
    import socket  # only now: until here the process is to be small

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
