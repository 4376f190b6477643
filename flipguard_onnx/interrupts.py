"""Signals that end a run, as an exception: it unwinds the stack, what is half done is removed."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AGAIN = 0.001  # seconds until an exception that nobody could catch is raised anew


class Interrupted(KeyboardInterrupt):
    """A signal has come. `code`: 128 + its number, the exit code by convention."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted whenever a signal comes; for the main thread.

    Every time: a library may swallow the first. Where Python itself must swallow it (it came in
    the middle of a __del__), it is raised once more. Signals that the parent has told this process
    to ignore (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    def unraisable(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            hook(lost)
            return
        number = lost.exc_value.number
        alarms.append(signal.signal(signal.SIGALRM, lambda _, frame: interrupt(number, frame)))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    alarms: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarms[0])
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
