"""Messages between this process and the child that loads the model: JSON and .npy, no pickles.

A model may have taken over the child, so nothing that the child sends is executed, and nothing
is allocated beyond what the receiver allows. A message goes over a pipe as

    8 bytes   length of the header, an unsigned little-endian integer; at most MAX_HEADER_BYTES
    header    a JSON object in UTF-8, {"fields": {...}, "arrays": [lengths in bytes]}
    arrays    one .npy file (numpy.lib.format, without pickles) per length, one after another

`fields` is any JSON object. What is neither text nor a number goes as an array; bytes, a serialized
protobuf for example, as one of uint8.
"""

import fcntl
import io
import json
import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import first_line

MAX_HEADER_BYTES = 16 << 20  # of a message, and so of all names in it

PIPE_BYTES = 1 << 20  # that a pipe holds, where the system allows it

DTYPE_CHARS = frozenset("?bBhHiIlLqQefdFD")  # booleans, integers, floats, complex numbers

_LENGTH_BYTES = 8

_NPY_MAGIC = np.lib.format.magic(1, 0)

Array = npt.NDArray[Any]


class MessageError(Exception):
    """What came over the pipe is not a message, or not the one expected."""


class UnsendableError(Exception):
    """A value that a message cannot hold, or too many names and options."""


@dataclass(frozen=True)
class Message:
    """A JSON object, and arrays.

    Parameters
    ----------
    fields : any JSON object
    arrays : arrays of booleans, integers, floats or complex numbers, of any shape
    """

    fields: dict[str, Any]
    arrays: Sequence[Array] = ()


class Channel:
    """One end of a conversation: a pipe to read from and a pipe to write to.

    Parameters
    ----------
    readable, writable : file descriptors, which the channel owns from now on
    """

    def __init__(self, readable: int, writable: int) -> None:
        self._readable, self._writable = readable, writable
        for descriptor in (readable, writable):
            os.set_blocking(descriptor, False)
            with suppress(OSError):  # a limit on the memory in pipes
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, message: Message, deadline: float | None = None) -> None:
        """Write a message; contiguous arrays are written without a copy.

        Parameters
        ----------
        message : what to send
        deadline : time.monotonic() until which the other side must have taken it

        Raises
        ------
        UnsendableError
            Before anything is written.
        TimeoutError
            At the deadline.
        OSError
            When the other side has closed its end.
        """
        for piece in encoded(message):
            self._write(memoryview(piece), deadline)

    def receive(self, max_bytes: int | None = None, deadline: float | None = None) -> Message:
        """Read a message.

        Parameters
        ----------
        max_bytes : of all arrays together
        deadline : time.monotonic() until which the whole message must be there

        Raises
        ------
        MessageError
            When it is malformed or too large.
        TimeoutError
            At the deadline.
        EOFError
            When the other side has closed its end.
        """
        length = int.from_bytes(self._read(_LENGTH_BYTES, deadline), "little")
        if length > MAX_HEADER_BYTES:
            raise MessageError(f"a header of {length} bytes")
        fields, sizes = _parsed_header(self._read(length, deadline))
        if max_bytes is not None and sum(sizes) > max_bytes:
            raise MessageError(f"arrays of {sum(sizes)} bytes")
        return Message(fields, [self._read_array(size, deadline) for size in sizes])

    def close(self) -> None:
        """Close both pipes."""
        os.close(self._readable)
        os.close(self._writable)

    def _read_array(self, size: int, deadline: float | None) -> Array:
        """An .npy file of `size` bytes, read straight into the array's memory."""
        start = len(_NPY_MAGIC) + 2
        if size < start:
            raise MessageError(f"an array in {size} bytes")
        head = self._read(start, deadline)
        length = int.from_bytes(head[-2:], "little")
        if not head.startswith(_NPY_MAGIC) or start + length > size:
            raise MessageError("an array that is not an .npy file of version 1.0")
        header = head[-2:] + self._read(length, deadline)
        array = _empty_array(header, size - start - length)
        self._read_into(_bytes_of(array), deadline)
        return array

    def _read(self, size: int, deadline: float | None) -> bytearray:
        content = bytearray(size)
        self._read_into(memoryview(content), deadline)
        return content

    def _read_into(self, buffer: memoryview, deadline: float | None) -> None:
        while buffer:
            try:
                count = os.readv(self._readable, [buffer])
            except BlockingIOError:
                _wait(self._readable, select.POLLIN, deadline)
                continue
            if not count:
                raise EOFError("the other side has closed the pipe")
            buffer = buffer[count:]

    def _write(self, buffer: memoryview, deadline: float | None) -> None:
        while buffer:
            try:
                buffer = buffer[os.write(self._writable, buffer) :]
            except BlockingIOError:
                _wait(self._writable, select.POLLOUT, deadline)


def encoded(message: Message) -> list[bytes | memoryview]:
    """A message as it goes over the wire, in pieces. Raises UnsendableError."""
    files = [_npy(array) for array in message.arrays]
    sizes = [len(head) + len(data) for head, data in files]
    header = json.dumps({"fields": message.fields, "arrays": sizes}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise UnsendableError(f"names and options of {len(header)} bytes")
    length = len(header).to_bytes(_LENGTH_BYTES, "little")
    return [length, header, *(piece for file in files for piece in file)]


def outputs_message(names: Sequence[str], values: Sequence[Any]) -> Message:
    """What onnxruntime returned, as a message; tensors of strings go into its fields.

    Parameters
    ----------
    names, values : of the outputs

    Raises
    ------
    UnsendableError
        For a value that is not a tensor: a sequence, a map, an absent optional.
    """
    strings: dict[str, Any] = {}
    arrays: list[Array] = []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray):
            raise UnsendableError(f"output {name!r} is {_kind(value)}; allowed: tensors")
        if value.dtype.char in DTYPE_CHARS:
            arrays.append(value)
        elif value.dtype == object and all(isinstance(text, str) for text in value.flat):
            strings[str(len(arrays) + len(strings))] = {
                "shape": value.shape,
                "values": value.reshape(-1).tolist(),
            }
        else:
            raise UnsendableError(
                f"output {name!r} holds {value.dtype}; allowed: numbers and strings"
            )
    return Message({"strings": strings}, arrays)


def outputs_of(message: Message, count: int) -> list[Array]:
    """The `count` arrays in a message that `outputs_message` made.

    Raises MessageError if it holds others.
    """
    strings, arrays = message.fields.get("strings"), iter(message.arrays)
    if type(strings) is not dict or len(strings) + len(message.arrays) != count:
        raise MessageError(f"not {count} outputs")
    try:
        return [
            _string_array(**strings[str(i)]) if str(i) in strings else next(arrays)
            for i in range(count)
        ]
    except (StopIteration, TypeError, ValueError):
        raise MessageError("malformed outputs") from None


def _string_array(shape: list[int], values: list[str]) -> Array:
    if not all(type(text) is str for text in values):
        raise ValueError
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _kind(value: Any) -> str:
    kinds = {list: "a sequence", dict: "a map", type(None): "an absent optional"}
    return kinds.get(type(value), type(value).__name__)


def _npy(array: Array) -> tuple[bytes, memoryview]:
    """Header and data of an .npy file; the data is the memory of the array if it is contiguous."""
    if array.dtype.char not in DTYPE_CHARS:
        raise UnsendableError(f"an array of {array.dtype}")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = array.copy(order="C")
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue(), _bytes_of(array)


def _bytes_of(array: Array) -> memoryview:
    """The memory of a contiguous array, as bytes."""
    in_order = array if array.flags.c_contiguous else array.T
    return in_order.reshape(-1).view(np.uint8).data


def _parsed_header(content: bytearray) -> tuple[dict[str, Any], list[int]]:
    """The fields, and the lengths of the arrays."""
    try:
        header = json.loads(content.decode())
        fields, sizes = header["fields"], header["arrays"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MessageError("a header that is not the JSON expected") from None
    if type(fields) is not dict or type(sizes) is not list:
        raise MessageError("a header that is not the JSON expected")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise MessageError("a header with lengths that are not numbers from 0 on")
    return fields, sizes


def _empty_array(header: bytearray, size: int) -> Array:
    """An array as the header of an .npy file describes it, which must take `size` bytes."""
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
        fits = min(shape, default=0) >= 0 and prod(shape) * dtype.itemsize == size
        if dtype.char in DTYPE_CHARS and fits:
            return np.empty(shape, dtype, order="F" if fortran_order else "C")
    except Exception as error:  # numpy's parser raises exceptions of many types
        raise MessageError(f"an array with a malformed header ({first_line(error)})") from None
    raise MessageError(f"an array of {dtype} {shape[:8]} in {size} bytes")


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    """Wait until the pipe can be read or written, or the other side has closed it."""
    poll = select.poll()
    poll.register(descriptor, event)
    if deadline is None:
        poll.poll()
        return
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    poll.poll(1000 * min(seconds, 3600))  # the caller tries again, and comes back
