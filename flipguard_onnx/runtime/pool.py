"""One task for many items: in processes of this machine, or on a Dask cluster.

A task is a function of a module, of an item and of the progress to report. It returns the failures
that it expects; if it raises, or its process dies, the result is Lost. Items and results are
pickled: these processes run the tool's own code, and leave models to a child of theirs (see
`session`), which speaks JSON.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from ..errors import DeviceError, first_line
from ..interrupts import Interrupted, interruptible

CONNECT_SECONDS = 10.0  # to find a scheduler

STOP_SECONDS = 30.0  # for a process to remove unfinished files; then it is killed

TELL_SECONDS = 0.1  # between two reports of the progress of one stage

Task = Callable[..., Any]


@dataclass(frozen=True)
class Lost:
    """An item without a result.

    Parameters
    ----------
    reason : in one line
    """

    reason: str


class Event(NamedTuple):
    """What a Progress is called with."""

    stage: str
    done: int
    total: int


def in_processes(
    task: Task, items: Sequence[Any], count: int, tell: Callable[[int, Event], None]
) -> Generator[tuple[int, Any]]:
    """Run the task in processes that have equal shares of the cores.

    Parameters
    ----------
    task, items : the function and its arguments
    count : of processes, at the most
    tell : called with the index of an item and its progress

    Returns
    -------
    An iterator over (index, result or Lost), in the order in which they come.
    """
    waiting = deque(enumerate(items))
    shares = core_shares(sorted(os.sched_getaffinity(0)), min(count, len(items)))
    idle = [_Process(task, cores) for cores in shares]
    busy: dict[Connection, tuple[_Process, int]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                process = idle.pop()
                index, item = waiting.popleft()
                busy[process.start(item)] = process, index
            for connection in wait(list(busy)):
                process, index = busy[connection]  # type: ignore[index]
                result = process.result()
                if isinstance(result, Event):
                    tell(index, result)
                    continue
                del busy[connection]  # type: ignore[arg-type]
                idle.append(process)
                yield index, result
    finally:
        with ExitStack() as stack:  # stops them all, even if stopping one of them raises
            for process in [*idle, *(process for process, _ in busy.values())]:
                stack.callback(process.stop)


def on_dask(
    task: Task, items: Sequence[Any], address: str, connect_seconds: float = CONNECT_SECONDS
) -> Generator[tuple[int, Any]]:
    """Run the task on the workers of a Dask scheduler.

    Parameters
    ----------
    task, items : the function and its arguments. Dask runs an item again whose worker is lost.
    address : of the scheduler
    connect_seconds : to find it

    Returns
    -------
    An iterator over (index, result or Lost), in the order in which they come.

    Raises
    ------
    DeviceError
        When Dask is not installed, or there is no scheduler at the address.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise DeviceError(
            "a scheduler needs a package that is not installed: pip install 'distributed>=2025.1'"
        ) from None
    client: Any = None
    problem = ""
    try:
        client = Client(address, timeout=connect_seconds, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        problem = first_line(error)
    if client is None:
        gc.collect()  # ends the client's event loop now, not while another one starts
        raise DeviceError(
            "scheduler {found!r} cannot be used: {problem}", found=address, problem=problem
        )
    with client:
        futures = client.map(task, items, pure=False)
        index_of = {future.key: index for index, future in enumerate(futures)}
        try:
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
                raised = future.exception()
                yield index_of[future.key], Lost(described(raised)) if raised else future.result()
        finally:
            client.cancel(futures)


def core_shares(cores: Sequence[int], count: int) -> list[set[int]]:
    """The cores dealt out to `count` processes; processes share cores if there are too few."""
    return [
        set(cores[i * len(cores) // count : (i + 1) * len(cores) // count])
        or {cores[i * len(cores) // count]}
        for i in range(count)
    ]


def described(error: BaseException) -> str:
    """An unexpected exception, in one line."""
    return first_line(Exception("".join(traceback.format_exception_only(error))))


class _Process:
    """A process that runs the task for one item after another; replaced if it dies."""

    def __init__(self, task: Task, cores: set[int]) -> None:
        self._task = task
        self._cores = cores
        self._launch()

    def _launch(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, other_end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(self._task, other_end))
        with _inherited(self._cores):
            self._process.start()
        other_end.close()

    def start(self, item: Any) -> Connection:
        """Start with an item; when the connection returned is ready, `result` has something."""
        with suppress(BrokenPipeError):  # dead: result() will tell
            self._connection.send(item)
        return self._connection

    def result(self) -> Any:
        """The result or the Event that has come, or Lost if the process has died."""
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._launch()
            return Lost(f"its process died ({end})")

    def stop(self) -> None:
        """End the process, and kill it if it does not clean up in time."""
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        self._process.kill()


@contextmanager
def _inherited(cores: set[int]) -> Iterator[None]:
    """Let a process that is started inside inherit these cores, and leave Ctrl-C to this one.

    On fewer cores every library starts fewer threads by itself.
    """
    resource_tracker.ensure_running()  # it unblocks SIGINT as it starts
    before = os.sched_getaffinity(0)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _serve(task: Task, connection: Connection) -> None:
    told, last, sending = "", 0.0, threading.Lock()

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told, last
        with sending:
            now = time.monotonic()
            if stage != told or done in (0, total) or now - last > TELL_SECONDS:
                told, last = stage, now
                connection.send(Event(stage, done, total))

    with suppress(Interrupted, EOFError, BrokenPipeError), interruptible():
        while True:
            connection.send(task(connection.recv(), tell))
