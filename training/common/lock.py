"""One writer to a folder: an operating system's lock on an open file, which ends with its process, come what may."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

NAME = ".lock"
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks answer


@contextmanager
def locked(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing, and removed again if it has stayed empty.

    Args:
        option: what the user named the folder with.

    Raises:
        UserError: another process holds the lock (which one, as far as it has said so), or the folder cannot be used.
    """
    path, named = folder / NAME, f"{option}={str(folder)!r}"
    with ExitStack() as held:
        try:
            absent = [place for place in (folder, *folder.parents) if not place.exists()]
            held.callback(remove_empty, absent)
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or (path.exists() and not path.is_file()):  # what a link names would be written to
                raise UserError(f"{named} cannot be locked: {NAME} in it is no file; remove it")
            held.enter_context(FileLock(path, timeout=0, mode=0o644))
            held.callback(forget, path)
            with contextlib.suppress(OSError):  # a full disk; Windows, which locks the text too
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        except Timeout as error:
            raise UserError(
                f"{named} is in use by {holder(path)}, which writes to it; wait for its end, stop it, or pass another "
                "folder"
            ) from error
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise UserError(f"{named} cannot be written to: {error.strerror or error}") from error
            print(f"note: {str(folder)!r} cannot be locked ({error.strerror}): start no second run in it")
        yield


def holder(path: Path) -> str:
    """Whose lock it is, as its file tells people."""
    with contextlib.suppress(OSError):
        return " ".join(path.read_text(errors="replace")[:200].split()) or "another process"
    return "another process"


def forget(path: Path) -> None:
    """Remove the file of a lock; Windows removes no open file."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()
