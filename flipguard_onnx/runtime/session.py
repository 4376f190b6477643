"""The only module that hands models to onnx's and onnxruntime's C++, in a child process.

A model may crash the child, keep it busy for ever or ask for all the memory there is: the child is
then ended, and the caller gets a ValidationError. The same happens to a child that gives malformed
answers. These are JSON and arrays (see `messages`), which cannot run code here.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, helper

from ..errors import LoadError, ModelError, RunError, ValidationError
from .messages import Array, Channel, Message, MessageError, UnsendableError, outputs_of
from .settings import NO_TELEMETRY, Limits, StaticQuantization

OUT_OF_MEMORY = "bad_alloc", "BFCArena"  # in onnxruntime's words

Answer = TypeVar("Answer")


class RemoteError(Exception):
    """What a request met in the child: the first line of the exception's message."""


class Child:
    """The child process; started with the first request and again after it had to be ended.

    Parameters
    ----------
    limits : on the time and the memory of every request
    worker : module whose function `main` the process runs
    """

    def __init__(self, limits: Limits | None = None, worker: str = f"{__package__}.worker") -> None:
        self.limits = limits or Limits()
        self._worker = worker
        self.life = 0  # counts the processes; sessions of an earlier one are gone
        self.forgotten: list[tuple[int, int]] = []  # lives and numbers of unused sessions
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._owner = 0  # process that started the child; a fork of it has none
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The number of the process, if there is one."""
        return self._process.pid if self._process else None

    def ask(
        self,
        request: str,
        arguments: dict[str, Any],
        size: int,
        read: Callable[[Message], Answer],
        arrays: Sequence[Array] = (),
    ) -> Answer:
        """Send one request and wait for its answer.

        Parameters
        ----------
        request : name of a function of `worker`
        arguments : what it is called with, as JSON can hold it
        size : bytes of the model that the request is about, by which it gets time and memory
        read : makes the result of the answer; raises MessageError for one that is not as expected
        arrays : what else it is called with

        Raises
        ------
        RemoteError
            When the request failed in the child.
        ValidationError
            When the child had to be ended, or a message cannot hold the arguments or the result.
        """
        seconds, memory = self.limits.seconds_for(size), self.limits.memory_for(size)
        with self._lock:
            channel = self._started()
            forgotten, self.forgotten = self.forgotten, []
            numbers = [number for life, number in forgotten if life == self.life]
            call = {"request": request, "arguments": arguments}
            message = Message(call | {"memory": memory, "forget": numbers}, arrays)
            deadline = time.monotonic() + seconds
            try:
                channel.send(message, deadline)
                answer = channel.receive(memory, deadline)
                problem = _problem(answer)
                if problem is None:
                    return read(answer)
            except UnsendableError as error:
                self.forgotten += forgotten
                raise ValidationError("cannot be run: {found}", found=str(error)) from None
            except TimeoutError:
                self._end()
                raise ValidationError(
                    "takes longer than {seconds:.0f} s; stopped", seconds=seconds
                ) from None
            except (EOFError, OSError):
                end = self._end()
                raise ValidationError("crashes onnxruntime ({end})", end=end) from None
            except MessageError as error:
                self._end()
                raise ValidationError(
                    "its process gave a malformed answer: {found}; stopped", found=str(error)
                ) from None
            except BaseException:  # an interrupt too: the next request must not get this answer
                self._end()
                raise
        raise problem

    def close(self) -> None:
        """End the child, if there is one and this process started it."""
        if self._process and self._owner == os.getpid():
            self._end()

    def _started(self) -> Channel:
        if self._channel and self._owner == os.getpid():
            return self._channel
        if self._channel:
            self._channel.close()
        self.life += 1
        self._owner = os.getpid()
        requests, send = os.pipe()
        receive, answers = os.pipe()
        # -P and the path: nothing that lies in the working directory is imported
        path = [str(folder) for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from {self._worker} import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(requests), str(answers)],
            pass_fds=(requests, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | NO_TELEMETRY,
        )
        os.close(requests)
        os.close(answers)
        self._channel = Channel(receive, send)
        return self._channel

    def _end(self) -> str:
        """Kill the child unless it is ending by itself; the signal or exit code it ended with."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        self.life += 1
        if process is None or channel is None:
            return "not started"
        channel.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


shared_child = Child()  # of everything in this process that asks for no other

atexit.register(shared_child.close)


class Session:
    """A model loaded into onnxruntime; its memory is free again when nothing refers to this.

    Parameters
    ----------
    path, exact, size, child : as in `open_session`

    Attributes
    ----------
    outputs : names of the model's outputs
    whole : it is in memory, always
    """

    whole = True

    def __init__(self, path: Path, exact: bool, size: int, child: Child) -> None:
        self._name, self._size, self._child = path.name, size, child
        arguments = {"path": str(path.absolute()), "exact": exact}
        self._number, self.outputs = child.ask("load", arguments, size, _loaded)
        self._life = child.life

    def run(self, names: list[str] | None, feed: dict[str, Array]) -> list[Array]:
        """Run the model.

        Parameters
        ----------
        names : of the outputs to return; None for all
        feed : an array for every input, by name

        Raises
        ------
        RunError
            When onnxruntime refuses.
        ValidationError
            When it crashes, takes too long, or returns what is no tensor.
        """
        return self._asked("run", self.outputs if names is None else names, feed, {})

    def go_on(
        self, names: list[str], feed: dict[str, Array], successors: dict[str, str]
    ) -> list[Array]:
        """As `run`, where other outputs stay in the child: a decoder's caches.

        successors: by the names of these outputs, those of the inputs that they are in the next
        such run unless its feed has others
        """
        return self._asked("go_on", names, feed, {"successors": successors})

    def _asked(
        self, request: str, names: list[str], feed: dict[str, Array], more: dict[str, Any]
    ) -> list[Array]:
        if self._life != self._child.life:
            raise ValidationError("is gone: another model crashed onnxruntime", path=self._name)
        arguments = {"session": self._number, "outputs": names, "inputs": list(feed), **more}
        try:
            return self._child.ask(
                request,
                arguments,
                self._size,
                lambda answer: outputs_of(answer, len(names)),
                list(feed.values()),
            )
        except RemoteError as error:
            problem = str(error)
            if any(words in problem for words in OUT_OF_MEMORY):
                memory = self._child.limits.memory_for(self._size) >> 20
                problem = f"needs more than {memory} MiB, fewer or shorter samples less: {problem}"
            raise RunError(problem) from None
        except ValidationError as error:
            raise error.at(self._name) from None

    def run_all(
        self, names: Sequence[str], feeds: Iterable[dict[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        """These outputs, by name, for one feed after the other. Raises as `run` does."""
        for feed in feeds:
            yield dict(zip(names, self.run(list(names), feed), strict=True))

    def __del__(self) -> None:
        if hasattr(self, "_life"):
            self._child.forgotten.append((self._life, self._number))


def open_session(path: Path, exact: bool, size: int, child: Child = shared_child) -> Session:
    """An onnxruntime session on the CPU.

    Parameters
    ----------
    path : the model
    exact : fold DequantizeLinear to float32 at load, and let MatMulNBits compute in float32, so
        that weights count as they are stored; without it onnxruntime also replaces parts of the
        graph by integer kernels, which round activations
    size : bytes of the model with its data
    child : the process that loads it

    Raises
    ------
    LoadError
        When onnxruntime does not accept the file.
    ValidationError
        When it is missing, or crashes or takes too long.
    """
    if not find_spec("onnxruntime"):
        raise ValidationError(
            "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu"
        )
    try:
        return Session(path, exact, size, child)
    except RemoteError as error:
        raise LoadError("does not load: {found}", path=path.name, found=str(error)) from None
    except ValidationError as error:
        raise error.at(path.name) from None


def require_openable(*paths: Path) -> None:
    """Raise ModelError for a path that onnxruntime cannot be given."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ModelError(
                "onnxruntime opens no path that is not UTF-8",
                path=path,
                allowed="another name, or to go without (--no-validate --preserve off)",
            ) from None


def check(path: Path, size: int) -> str | None:
    """What onnx.checker has against a file of `size` bytes; None when it accepts it."""
    try:
        shared_child.ask("check", {"path": str(path.absolute())}, size, _nothing)
    except RemoteError as error:
        return str(error)
    return None


def converted(proto: ModelProto, opset: int) -> ModelProto:
    """A model at another version of the standard operators. Raises RemoteError."""
    return _edited("convert", {"opset": opset}, proto)


def inlined(proto: ModelProto) -> ModelProto:
    """A model with its local functions expanded. Raises RemoteError."""
    return _edited("inline", {}, proto)


def inferred(proto: ModelProto) -> ModelProto:
    """A model with the shapes that onnx infers. Raises RemoteError."""
    return _edited("infer", {}, proto)


def evaluate(
    path: Path, result: Path, size: int, max_bytes: int
) -> list[tuple[int, tuple[int, ...], int, int]]:
    """Compute a model without inputs, and write its outputs' values into a file.

    Parameters
    ----------
    path : the model, `size` bytes with its data
    result : the file for the values
    max_bytes : that they may have

    Returns
    -------
    For each output its type, its shape, and where its bytes are in the file: offset and length.

    Raises
    ------
    RemoteError, ValidationError
        When it cannot be computed.
    """
    arguments = _paths(path, result) | {"max_bytes": max_bytes}
    return shared_child.ask(
        "evaluate", arguments, size, lambda answer: _evaluated(answer, result, max_bytes)
    )


def preprocess(path: Path, result: Path, size: int) -> None:
    """Write what onnxruntime's pre-processing makes of a model of `size` bytes.

    Raises RemoteError.
    """
    shared_child.ask("preprocess", _paths(path, result), size, _nothing)


def quantize_static(
    path: Path, result: Path, settings: StaticQuantization, feeds: Sequence[dict[str, Array]]
) -> None:
    """Write what onnxruntime's static quantizer makes of a model.

    Parameters
    ----------
    path : the float model
    result : where the quantized one goes
    settings : what the quantizer is told
    feeds : inputs on which it finds the ranges of activations

    Raises
    ------
    ValidationError
        When it refuses.
    """
    size = path.stat().st_size * (1 + len(feeds))  # it runs the model on each
    arguments = _paths(path, result) | {
        "settings": asdict(settings),
        "inputs": [list(feed) for feed in feeds],
    }
    arrays = [array for feed in feeds for array in feed.values()]
    try:
        shared_child.ask("quantize", arguments, size, _nothing, arrays)
    except (RemoteError, ValidationError) as error:
        raise ValidationError("onnxruntime's static quantizer: {found}", found=str(error)) from None


def tokenized(path: Path, texts: Sequence[str]) -> Array:
    """The token ids of texts, one text after the other, by a tokenizer.json.

    Raises RemoteError, ValidationError.
    """
    content = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    size = path.stat().st_size + content.size
    return shared_child.ask("tokenize", {"path": str(path)}, size, _token_ids, [content])


def _paths(path: Path, result: Path) -> dict[str, Any]:
    return {"path": str(path.absolute()), "result": str(result.absolute())}


def _edited(request: str, arguments: dict[str, Any], proto: ModelProto) -> ModelProto:
    content = np.frombuffer(proto.SerializeToString(), np.uint8)
    return shared_child.ask(request, arguments, content.size, _model, [content])


def _problem(answer: Message) -> Exception | None:
    """The error that an answer reports, if it does. Raises MessageError if it is malformed."""
    status, problem = answer.fields.get("status"), answer.fields.get("problem")
    if status == "done":
        return None
    if type(problem) is not str or status not in ("failed", "unsendable"):
        raise MessageError("neither a result nor an error")
    return RemoteError(problem) if status == "failed" else ValidationError(problem)


def _nothing(answer: Message) -> None:
    """The result of a request that has none."""


def _token_ids(answer: Message) -> Array:
    if len(answer.arrays) != 1 or answer.arrays[0].ndim != 1 or answer.arrays[0].dtype != np.int64:
        raise MessageError("no list of token ids")
    return answer.arrays[0]


def _evaluated(
    answer: Message, result: Path, max_bytes: int
) -> list[tuple[int, tuple[int, ...], int, int]]:
    """Types and shapes of values in a file, whose lengths follow from them."""
    found, offset = [], 0
    try:
        for data_type, shape in answer.fields["values"]:
            if type(data_type) is not int or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError
            tensor = TensorProto(data_type=data_type, dims=shape)
            found.append((data_type, tuple(shape), offset, _byte_size(tensor)))
            offset += _byte_size(tensor)
        if offset > max_bytes or offset != result.stat().st_size:
            raise ValueError
    except (KeyError, TypeError, ValueError, OSError):
        raise MessageError("malformed values") from None
    return found


def _byte_size(tensor: TensorProto) -> int:
    return prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _loaded(answer: Message) -> tuple[int, list[str]]:
    """The number of a session, and the names of its outputs."""
    number, names = answer.fields.get("session"), answer.fields.get("outputs")
    if type(number) is not int or type(names) is not list:
        raise MessageError("no session")
    if not all(type(name) is str for name in names):
        raise MessageError("malformed names of outputs")
    return number, names


def _model(answer: Message) -> ModelProto:
    """A model, serialized as the only array."""
    if len(answer.arrays) != 1:
        raise MessageError("no model")
    try:
        return ModelProto.FromString(answer.arrays[0].tobytes())
    except DecodeError:
        raise MessageError("a model that does not parse") from None
