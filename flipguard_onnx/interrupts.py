"""Signals that end a run, as an exception: it unwinds the stack, so that cleaning up happens."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

RETRY_SECONDS = 0.001  # until an exception that nobody could catch is raised again


class Interrupted(KeyboardInterrupt):
    """A signal has come.

    Parameters
    ----------
    number : of the signal

    Attributes
    ----------
    code : exit code of the process by convention, 128 + number
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the main thread whenever one of SIGNALS comes.

    It is raised every time, since a library may swallow the first one. Where Python itself swallows
    it, in a __del__, a timer raises it again. Signals that the parent process has had ignored
    (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    def raise_again(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)
            return
        number = unraisable.exc_value.number
        alarms.append(signal.signal(signal.SIGALRM, lambda _, frame: interrupt(number, frame)))
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    alarms: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarms[0])
        for number in handled:
            signal.signal(number, before[number])


def surely(action: Callable[[], None]) -> None:
    """Run `action` to its end, from the start again after every signal; then raise the last one."""
    interrupt = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt:
        raise interrupt
