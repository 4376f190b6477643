"""Signals that end a run, as an exception: it unwinds the stack, so that cleaning up happens."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

RETRY_SECONDS = 0.1  # until an exception that had to wait, or that somebody swallowed, is raised

IMPORTS = "<frozen importlib._bootstrap>"  # the file of Python's own code that imports


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

    A first one that comes during an import is raised after it: compiled libraries crash, or swallow
    it, while they are loaded. Where one is swallowed, as Python does in a __del__, a timer raises
    it once more. Signals that the parent process has had ignored (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        is_first = not alarms
        raise_later(number)
        if not (is_first and _imports(frame)):
            raise Interrupted(number)

    def raise_later(number: int) -> None:
        def late(_: int, frame: FrameType | None) -> None:
            if _imports(frame):
                raise_later(number)
            elif not _on_its_way():
                raise Interrupted(number)

        alarms.append(signal.signal(signal.SIGALRM, late))
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    def not_raised(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            raise_later(unraisable.exc_value.number)
        else:
            hook(unraisable)

    alarms: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, not_raised
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


def _imports(frame: FrameType | None) -> bool:
    """Whether the code that runs there is part of an import."""
    while frame and frame.f_code.co_filename != IMPORTS:
        frame = frame.f_back
    return frame is not None


def _on_its_way() -> bool:
    """Whether an Interrupted is unwinding the stack, which takes long where files are removed."""
    error = sys.exception()
    while error and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None


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
