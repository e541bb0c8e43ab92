"""Stopping in order: the signals that end jobs become a request that the loop answers with a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# By which people, terminals, schedulers and limits of processor time end a job; Windows has the first two alone.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


def launched() -> bool:
    """Whether accelerate's or torch's launcher has started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


class StopRequest:
    """Remembers the first signal; later ones change nothing, because launchers send several.

    Inside `deferred()` the loop asks `pending()` and saves a checkpoint. Elsewhere (data that are being loaded, a test
    split, an upload) there is nothing to save: the first signal raises KeyboardInterrupt.

    The death of a launcher counts as SIGTERM: it cannot pass the signal on, and a training process that nobody waits
    for would otherwise run on unnoticed.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.in_loop = False
        self.launched, self.parent = launched(), os.getppid()

    def __enter__(self) -> "StopRequest":
        """Take over the signals. One that is ignored stays so, as `nohup` wants it of SIGHUP.

        SIGINT is the exception: a script's shell has every job in the background ignore it, asked or not.
        """
        taken = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self.former = {number: signal.signal(number, self.handle) for number in taken}
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the loop runs, a signal waits for the loop to ask; one that it asked for no more is raised at its end.

        Raises:
            KeyboardInterrupt: with the number of that signal.
        """
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False
        if self.signal_number:
            raise KeyboardInterrupt(self.signal_number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler.

        Raises:
            KeyboardInterrupt: with the number of the first signal, outside the loop. No library's `except Exception`
                swallows it.
        """
        first = not self.signal_number
        self.signal_number = self.signal_number or number
        if first and not self.in_loop:
            raise KeyboardInterrupt(number)

    def pending(self) -> int:
        """Number of the signal that asked to stop, or 0."""
        if self.launched and os.getppid() != self.parent:
            self.handle(signal.SIGTERM, None)
        return self.signal_number
