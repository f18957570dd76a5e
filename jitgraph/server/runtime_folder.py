"""The private folder of one front-end process, where its engines' sockets lie. Any thread.

Its owner holds a lock on it for as long as it lives, however it ends. So whoever starts later can tell the folder of a
dead process, in whatever container that was, from one in use, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from jitgraph.config import runtime_base
from jitgraph.errors import ConfigError
from jitgraph.ipc.sockets import MAX_PATH_BYTES

_NAME = re.compile(r"^jitgraph-\d+-\w+$")
_ROOM_BYTES = len("/jitgraph-4194304-12345678/s/engine-99.sock")
"""What a socket's path has behind the base; process ids have seven digits at most."""


class RuntimeFolder:
    """A folder of mode 0700 in ``jitgraph-PID-RANDOM`` below the user's runtime folder or the temporary one.

    The outer folder is the one that is locked: whoever listens in the inner one locks that for a moment.

    Raises:
        ConfigError: none can be made.
    """

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        if not _is_short(base):
            raise ConfigError(f"{base} is too long a path for sockets: set XDG_RUNTIME_DIR to a shorter one of yours")
        remove_stale(base)
        self._owner = os.getpid()
        try:
            while True:
                self._outer = Path(tempfile.mkdtemp(prefix=f"jitgraph-{self._owner}-", dir=base))
                lock = _lock(self._outer)
                if lock is not None:
                    break  # otherwise somebody who cleans up took the empty folder for a dead one
            self._lock: int | None = lock
            self.path = self._outer / "s"
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(f"no folder for sockets can be made in {base}: {error.strerror}") from error

    def remove(self) -> None:
        """Removes it with all that is in it. May be called more than once; a forked child's call does nothing."""
        if self._lock is None or os.getpid() != self._owner:
            return
        shutil.rmtree(self._outer, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RuntimeFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def remove_stale(base: Path) -> list[Path]:
    """Removes the folders of dead processes in ``base``; those removed."""
    removed = []
    with suppress(OSError):
        for path in sorted(base.iterdir()):
            if _NAME.match(path.name) and _is_mine(path):
                lock = _lock(path)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)
                    removed.append(path)
    return removed


def _base() -> Path:
    """Where such folders belong: the user's runtime folder, if it is one, else the temporary folder. Paths of sockets
    are short, so one that is too long for them is passed over."""
    named = runtime_base()
    if named is not None and os.path.isabs(named) and _is_mine(Path(named)) and _is_short(Path(named)):
        return Path(named)
    temporary = Path(tempfile.gettempdir())
    return temporary if _is_short(temporary) else Path("/tmp")


def _is_short(base: Path) -> bool:
    """Whether a socket's path fits below it."""
    return len(os.fsencode(base)) + _ROOM_BYTES <= MAX_PATH_BYTES


def _is_mine(path: Path) -> bool:
    """Whether it is a folder of this user that others cannot enter, and no link to one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _lock(path: Path) -> int | None:
    """A descriptor that locks the folder until it is closed; None where another process has it, or it is gone."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(folder).st_ino == path.lstat().st_ino:
            return folder
    except OSError:
        pass
    os.close(folder)
    return None
