"""The one place that hands models to onnx's and onnxruntime's C++: in a child process.

A model may crash it, run for ever or ask for all memory there is; the child then ends, and the
caller gets a ValidationError. Time and memory are granted by the size of the model.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy.typing as npt
from onnx import ModelProto

from ..errors import ModelError, RunError, ValidationError

SECONDS, BYTES_PER_SECOND = 60.0, 1e6  # for one load or run: so long, and so fast beyond

MEMORY, MEMORY_PER_BYTE = 4 << 30, 8  # bytes: so many, and so many more for each of the model

FREE_SHARE = 0.8  # of the machine's free memory, at the most

Array = npt.NDArray[Any]


class Child:
    """The child process; started with the first request and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        self.life = 0  # sessions of an earlier life are gone
        self.dropped: list[tuple[int, int]] = []  # lives and numbers of sessions to forget

    def ask(self, name: str, *arguments: Any, size: int) -> Any:
        """One request about a model of `size` bytes.

        Raises ValidationError when the child had to be ended, RemoteError for what it met.
        """
        seconds = SECONDS + size / BYTES_PER_SECOND
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self.life += 1
                self._start()
            dropped, self.dropped = self.dropped, []
            numbers = [number for life, number in dropped if life == self.life]
            try:
                self._requests.send((name, arguments, _memory(size), numbers))
                if not self._answers.poll(seconds):
                    raise ValidationError(f"takes longer than {seconds:.0f} s; stopped")
                done, result = self._answers.recv()
            except (EOFError, OSError):
                raise ValidationError(f"crashes onnxruntime ({self._end()})") from None
            except BaseException:  # an interrupt too: the answer to this must not be the next one's
                self._end()
                raise
        if not done:
            raise RemoteError(result)
        return result

    def close(self) -> None:
        """End the child, if there is one and it is this process's."""
        if self._process and self._owner == os.getpid():
            self._end()

    def _start(self) -> None:
        self._owner = os.getpid()
        requests, send = os.pipe()
        receive, answers = os.pipe()
        # -P and the path: nothing that lies in the working directory is imported
        path = [str(folder) for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from {__package__}.worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(requests), str(answers)],
            pass_fds=(requests, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(requests)
        os.close(answers)
        self._requests = Connection(send, readable=False)
        self._answers = Connection(receive, writable=False)

    def _end(self) -> str:
        """Kill the child unless it has just ended by itself; what it ended with."""
        process, self._process = self._process, None
        self.life += 1
        if process is None:
            return "not started"
        self._requests.close()
        self._answers.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class RemoteError(Exception):
    """What a request met: the first line of the exception's message."""


_CHILD = Child()

atexit.register(_CHILD.close)


class Session:
    """A model loaded into onnxruntime; its memory is free again when nothing refers to this."""

    def __init__(self, path: Path, exact: bool, size: int) -> None:
        self._name, self._size = path.name, size
        self._number, self.outputs = _CHILD.ask("load", str(path.absolute()), exact, size=size)
        self._life = _CHILD.life

    def run(self, names: list[str] | None, feed: dict[str, Array]) -> list[Array]:
        """The outputs of these names, or all. Raises RunError where onnxruntime refuses."""
        if self._life != _CHILD.life:
            raise ValidationError(f"{self._name}: is gone: another model crashed onnxruntime")
        try:
            results: list[Array] = _CHILD.ask("run", self._number, names, feed, size=self._size)
        except RemoteError as error:
            raise RunError(str(error)) from None
        except ValidationError as error:
            raise ValidationError(f"{self._name}: {error}") from None
        return results

    def __del__(self) -> None:
        if hasattr(self, "_life"):
            _CHILD.dropped.append((self._life, self._number))


def open_session(path: Path, exact: bool, size: int) -> Session:
    """An onnxruntime session on the CPU, for a model of `size` bytes with its data.

    exact: DequantizeLinear is folded to float32 at load, so that weights count as they are stored.
    Raises ValidationError when onnxruntime is missing or does not load the file.
    """
    if not find_spec("onnxruntime"):
        raise ValidationError(
            "onnxruntime is not installed; install flipguard-onnx[cpu] or [gpu], "
            "or write unvalidated with --no-validate --preserve off"
        )
    try:
        return Session(path, exact, size)
    except RemoteError as error:
        raise ValidationError(f"{path.name}: does not load: {error}") from None
    except ValidationError as error:
        raise ValidationError(f"{path.name}: {error}") from None


def require_openable(*paths: Path) -> None:
    """Raise ModelError for a path that onnxruntime cannot be given."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"{path}: onnxruntime opens no path that is not UTF-8; allowed: another name, "
                "or to go without (--no-validate --preserve off)"
            ) from None


def check(path: Path, size: int) -> str | None:
    """What onnx.checker has against a file."""
    try:
        _CHILD.ask("check", str(path.absolute()), size=size)
    except RemoteError as error:
        return str(error)
    return None


def converted(proto: ModelProto, opset: int) -> ModelProto:
    """A model at another version of the standard operators. Raises RemoteError."""
    return _edited("convert", proto, opset)


def inlined(proto: ModelProto) -> ModelProto:
    """A model with its local functions expanded. Raises RemoteError."""
    return _edited("inline", proto)


def preprocess(path: Path, result: Path, size: int) -> None:
    """Write what onnxruntime's pre-processing makes of a model. Raises RemoteError."""
    _CHILD.ask("preprocess", str(path.absolute()), str(result.absolute()), size=size)


def quantize_static(
    path: Path,
    result: Path,
    operators: Sequence[str],
    excluded: Sequence[str],
    activations: str,
    symmetric: bool,
    method: str,
    per_channel: bool,
    feeds: Sequence[dict[str, Array]],
) -> None:
    """Write what onnxruntime's static quantizer makes of a model.

    operators: the kinds of nodes to quantize; excluded: the names of those not to. activations:
    their type; symmetric: with zero point in the middle. per_channel: scales of the weights.
    method: of calibration on `feeds`.
    Raises ValidationError where it refuses.
    """
    settings = activations, symmetric, method, per_channel
    given = list(operators), list(excluded), *settings, list(feeds)
    size = path.stat().st_size * (1 + len(feeds))  # it runs the model on each
    try:
        _CHILD.ask("quantize", str(path.absolute()), str(result.absolute()), *given, size=size)
    except (RemoteError, ValidationError) as error:
        raise ValidationError(f"onnxruntime's static quantizer: {error}") from None


def _edited(request: str, proto: ModelProto, *arguments: Any) -> ModelProto:
    content = proto.SerializeToString()
    result = ModelProto()
    result.ParseFromString(_CHILD.ask(request, content, *arguments, size=len(content)))
    return result


def _memory(size: int) -> int:
    """Bytes that the child may have for a model of that size."""
    allowed = MEMORY + MEMORY_PER_BYTE * size
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return allowed
    free = next((int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable")), allowed)
    return min(allowed, int(FREE_SHARE * free))
