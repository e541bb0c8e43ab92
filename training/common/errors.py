"""Errors that a user can act on: printed as one line without a traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input or a run that cannot continue; the message names the field, the value and what is allowed.

    `shared` says that every process of a run raises it, so that one of them saying it is enough.
    """

    exit_code = 1

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Interrupted(UserError):
    """The run was asked to stop (SIGTERM, Ctrl-C); a checkpoint has been written. `exit_code` is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, shared=True)
        self.exit_code = 128 + signal_number


def run_command(run: Callable[[list[str]], Any], argv: list[str] | None) -> int:
    """The exit code of a command that runs with these words, by default those of the command line.

    A `UserError` is one line on standard error.
    """
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def printable(name: str) -> str:
    """The name of a file as UTF-8 can hold it: bytes of another encoding are shown as `\\xe9`."""
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)
