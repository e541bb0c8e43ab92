"""One writer to a folder: an operating system's lock on an open file, which ends with its process, come what may."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

NAME = ".lock"
if sys.platform == "win32":
    import msvcrt

    def take(handle: int) -> None:
        """Lock a byte far behind the text, which others may then still read; OSError if another process holds it."""
        os.lseek(handle, 1 << 30, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def take(handle: int) -> None:
        """Lock the file; OSError if another process holds it."""
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
handles: set[int] = set()


def let_go() -> None:
    """In a forked child: the lock is its parent's alone, and would otherwise outlive it."""
    for handle in handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


@contextmanager
def locked(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing, and removed again if it has stayed empty.

    Args:
        option: what the user named the folder with.

    Raises:
        UserError: another process holds the lock (which one, as far as it has said so), or the folder cannot be used.
    """
    absent: list[Path] = []
    try:
        try:
            absent = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            handle = acquire(folder, option)
        except OSError as error:
            raise UserError(f"{option}={str(folder)!r} cannot be written to: {error.strerror or error}") from error
        handles.add(handle)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                (folder / NAME).unlink()
            handles.discard(handle)
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):
            for path in absent:
                path.rmdir()


def acquire(folder: Path, option: str) -> int:
    """The open file that holds the lock. Its text says whose it is, to people alone."""
    path = folder / NAME
    while True:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # what a link names would be written to
            raise UserError(f"{option}={str(folder)!r} cannot be locked: {NAME} in it is no file; remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            take(handle)
        except OSError as error:
            os.lseek(handle, 0, os.SEEK_SET)
            holder = " ".join(os.read(handle, 200).decode(errors="replace").split()) or "another process"
            os.close(handle)
            if error.errno not in HELD_ELSEWHERE:
                print(f"note: {str(folder)!r} cannot be locked ({error.strerror}): start no second run in it")
                return os.open(os.devnull, os.O_RDONLY)
            raise UserError(
                f"{option}={str(folder)!r} is in use by {holder}, which writes to it; wait for its end, stop it, or "
                "pass another folder"
            ) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):  # else its holder removed it at the same moment
                with contextlib.suppress(OSError):  # a full disk
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle
        os.close(handle)
