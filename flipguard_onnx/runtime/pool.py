"""One task for many items: in processes of this machine, or on a Dask cluster.

A task is a function of a module, and returns what it has to say about failures: what it raises, or
a process that it takes down, is Lost.
"""

import gc
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import DeviceError, first_line
from ..interrupts import Interrupted, interruptible

CONNECT_SECONDS = 10

STOP_SECONDS = 30  # for a process to remove what it has half done; then it is killed

Task = Callable[[Any], Any]


@dataclass(frozen=True)
class Lost:
    """No result has come back. reason: one line."""

    reason: str


def in_processes(task: Task, items: Sequence[Any], count: int) -> Generator[tuple[int, Any]]:
    """(index, result or Lost) as they come; `count` processes with an equal share of the cores."""
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
                del busy[connection]  # type: ignore[arg-type]
                idle.append(process)
                yield index, result
    finally:
        with ExitStack() as stack:  # to stop them all, whatever comes in between
            for process in [*idle, *(process for process, _ in busy.values())]:
                stack.callback(process.stop)


def on_dask(task: Task, items: Sequence[Any], address: str) -> Generator[tuple[int, Any]]:
    """(index, result or Lost) as they come from the workers of the scheduler at `address`.

    An item whose worker is lost goes to another one, as Dask does it: the task must bear that.
    Raises DeviceError when there is no Dask here, or no scheduler there.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise DeviceError(
            "dask.distributed is not installed; a scheduler needs flipguard-onnx[dask]"
        ) from None
    client: Any = None
    problem = ""
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        problem = first_line(error)
    if client is None:
        gc.collect()  # what is left of it ends its loop now, not while another one starts
        raise DeviceError(f"scheduler {address!r} cannot be used: {problem}")
    with client:
        futures = client.map(task, items, pure=False)
        index = {future.key: place for place, future in enumerate(futures)}
        try:
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
                why = future.exception()
                yield index[future.key], Lost(described(why)) if why else future.result()
        finally:
            client.cancel(futures)


def core_shares(cores: Sequence[int], count: int) -> list[set[int]]:
    """The cores dealt out to `count` processes: one at least, shared where there are fewer."""
    return [
        set(cores[i * len(cores) // count : (i + 1) * len(cores) // count])
        or {cores[i * len(cores) // count]}
        for i in range(count)
    ]


def described(error: BaseException) -> str:
    """An exception that nobody expected, in one line."""
    return first_line(Exception("".join(traceback.format_exception_only(error))))


class _Process:
    """A process that does the task for one item after the other; a new one where it dies."""

    def __init__(self, task: Task, cores: set[int]) -> None:
        self._task = task
        self._cores = cores
        self._launch()

    def _launch(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(self._task, theirs))
        with _inherited(self._cores):
            self._process.start()
        theirs.close()

    def start(self, item: Any) -> Connection:
        """Begin; the result is there when the connection that is returned is ready."""
        with suppress(BrokenPipeError):  # dead: result() will tell
            self._connection.send(item)
        return self._connection

    def result(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._launch()
            return Lost(f"its process died ({how})")

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        self._process.kill()


@contextmanager
def _inherited(cores: set[int]) -> Iterator[None]:
    """What a process started here is to inherit: its cores, and to leave Ctrl-C to this one.

    On fewer cores every library starts fewer threads, without a word from us.
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
    with suppress(Interrupted, EOFError, BrokenPipeError), interruptible():
        while True:
            connection.send(task(connection.recv()))
