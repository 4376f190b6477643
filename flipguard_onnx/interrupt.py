"""Signals that end a run, as an exception: it unwinds the stack, what is half done is removed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal has come. `code`: 128 + its number, the exit code by convention."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted whenever a signal comes; for the main thread.

    Every time: a library may swallow the first. Signals that the parent has told this process to
    ignore (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def surely(action: Callable[[], None]) -> None:
    """Clean up, however many signals come meanwhile; `action` must bear to be begun again."""
    interrupt = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt:
        raise interrupt
