"""An ONNX file as protobuf puts it on the wire, walked as far as the tensors in it.

A protobuf library holds a file in memory before it parses it, and its tensors once more after
that. Here only what surrounds the tensors' data is looked at, and that data stays where it is.
Field numbers are those of onnx.proto, the encoding is protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from onnx import TensorProto

COPIED = 1 << 20  # bytes at a time

_INSIDE = {  # message -> number of a field -> the message in it, on the way to a tensor
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}

_RAW_DATA = 9  # field of a tensor

_OTHER_DATA = (4, 5, 6, 7, 10, 11, 13)  # float_data to uint64_data, and external_data

_DEEPEST = 100  # messages in one another, as protobuf has it

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # types on the wire


@dataclass(frozen=True)
class Region:
    """A run of bytes in a file."""

    file: Path
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def copy_to(self, stream: BinaryIO) -> None:
        """Write the bytes, with little of them in memory at a time."""
        with self.file.open("rb") as source:
            source.seek(self.offset)
            left = self.length
            while chunk := source.read(min(left, COPIED)):
                left -= stream.write(chunk)


Piece = memoryview | Region

Edit = Callable[[memoryview, int, int], list[Piece]]  # nothing: the message stays as it is


def skeleton(data: memoryview, smallest: int, location: str) -> bytes:
    """An ONNX file without the large tensors' data: they refer to their place in it.

    data: the file; smallest: bytes of data that a tensor must have to be taken out; location: what
    the file is called in the references. Raises DecodeError when the file is no protobuf.
    """

    def edit(data: memoryview, start: int, stop: int) -> list[Piece]:
        found = list(_fields(data, start, stop))
        raw = [place for number, *place in found if number == _RAW_DATA]
        if len(raw) != 1 or any(number in _OTHER_DATA for number, *_ in found):
            return []  # protobuf has rules for this, and applies them
        first, content, end = raw[0]
        if end - content < smallest:
            return []
        reference = TensorProto(data_location=TensorProto.EXTERNAL)
        for key, value in ("location", location), ("offset", content), ("length", end - content):
            reference.external_data.add(key=key, value=str(value))
        encoded = memoryview(reference.SerializeToString())
        return [data[start:first], data[end:stop], encoded]

    pieces = _rewritten(data, 0, len(data), "model", edit, smallest) or [data]
    return b"".join(piece for piece in pieces if isinstance(piece, memoryview))


def write_whole(proto: bytes, payload: Callable[[TensorProto], Region], stream: BinaryIO) -> None:
    """Write an ONNX file with the data of its external tensors in it.

    proto: the model, serialized; payload: where the data of a tensor lies.
    """

    def edit(data: memoryview, start: int, stop: int) -> list[Piece]:
        tensor = TensorProto.FromString(bytes(data[start:stop]))
        if tensor.data_location != TensorProto.EXTERNAL:
            return []
        region = payload(tensor)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        ahead = tensor.SerializeToString() + _header(_RAW_DATA, len(region))
        return [memoryview(ahead), region]

    data = memoryview(proto)
    for piece in _rewritten(data, 0, len(data), "model", edit, 0) or [data]:
        if isinstance(piece, Region):
            piece.copy_to(stream)
        else:
            stream.write(piece)


def _rewritten(
    data: memoryview, start: int, stop: int, kind: str, edit: Edit, smallest: int, depth: int = 0
) -> list[Piece]:
    """The message data[start:stop] in pieces, with what `edit` makes of its tensors; [] if nothing.

    Messages of fewer than `smallest` bytes stay as they are.
    """
    if depth > _DEEPEST:
        raise DecodeError(f"more than {_DEEPEST} messages in one another")
    pieces: list[Piece] = []
    done = start
    for number, first, content, end in _fields(data, start, stop):
        inside = _INSIDE[kind].get(number)
        if inside is None or end - content < smallest:
            continue
        if inside == "tensor":
            new = edit(data, content, end)
        else:
            new = _rewritten(data, content, end, inside, edit, smallest, depth + 1)
        if not new:
            continue
        ahead = _header(number, sum(map(len, new)))
        pieces += [data[done:first], memoryview(ahead), *new]
        done = end
    return [*pieces, data[done:stop]] if pieces else []


def _fields(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the content and end of every field of the message data[start:stop].

    Raises DecodeError where that is no message.
    """
    while start < stop:
        tag, content = _number(data, start, stop)
        kind = tag & 7
        if kind == _LENGTH:
            length, content = _number(data, content, stop)
            end = content + length
        elif kind == _VARINT:
            _, end = _number(data, content, stop)
        elif kind in (_FIXED64, _FIXED32):
            end = content + (8 if kind == _FIXED64 else 4)
        else:
            raise DecodeError(f"wire type {kind} at byte {start}")
        if tag >> 3 == 0 or end > stop:
            raise DecodeError(f"no whole field at byte {start}")
        yield tag >> 3, start, content, end
        start = end


def _number(data: memoryview, at: int, stop: int) -> tuple[int, int]:
    """The variable-length number at that byte, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : min(at + 10, stop)]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise DecodeError(f"no number at byte {at}")


def _header(number: int, length: int) -> bytes:
    """What stands before a field of `length` bytes."""
    encoded = bytearray()
    for value in (number << 3 | _LENGTH, length):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)
