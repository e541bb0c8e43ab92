"""Errors that a user can act on: printed as one line without a traceback."""

import re


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


def printable(name: str) -> str:
    """The name of a file as UTF-8 can hold it: bytes of another encoding are shown as `\\xe9`."""
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)
