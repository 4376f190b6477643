"""ONNX files in protobuf's encoding: take the tensors' data out of one, or put it in.

A protobuf library reads a whole file into memory, and copies the tensors when it parses it. Here
only what surrounds the tensors' data is read, and the data stays where it is.
Field numbers are those of onnx.proto, the encoding is protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from onnx import TensorProto

COPY_BYTES = 1 << 20  # at a time

_MESSAGES = {  # message -> number of a field -> the message in it, on the way to a tensor
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}

_RAW_DATA = 9  # field of a tensor

_OTHER_DATA = (4, 5, 6, 7, 10, 11, 13)  # float_data to uint64_data, and external_data

_MAX_DEPTH = 100  # of messages in messages; the limit of protobuf

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # types on the wire


@dataclass(frozen=True)
class Region:
    """`length` bytes of a file, from `offset` on."""

    file: Path
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def copy_to(self, stream: BinaryIO) -> None:
        """Write the bytes to a stream, COPY_BYTES at a time."""
        with self.file.open("rb") as source:
            source.seek(self.offset)
            left = self.length
            while chunk := source.read(min(left, COPY_BYTES)):
                left -= stream.write(chunk)


Piece = memoryview | Region

# What a tensor, the message data[start:stop], becomes; an empty list leaves it as it is.
Edit = Callable[[memoryview, int, int], list[Piece]]


def skeleton(data: memoryview, min_bytes: int, location: str) -> bytes:
    """An ONNX file without the data of large tensors, which become references to the file.

    Parameters
    ----------
    data : the file
    min_bytes : of a tensor's data; smaller tensors stay
    location : what the file is called in the references

    Raises
    ------
    DecodeError
        When the file is no protobuf.
    """

    def edit(data: memoryview, start: int, stop: int) -> list[Piece]:
        found = list(_fields(data, start, stop))
        raw = [bounds for number, *bounds in found if number == _RAW_DATA]
        if len(raw) != 1 or any(number in _OTHER_DATA for number, *_ in found):
            return []  # protobuf has rules for this, and applies them
        first, content, end = raw[0]
        if end - content < min_bytes:
            return []
        reference = TensorProto(data_location=TensorProto.EXTERNAL)
        for key, value in ("location", location), ("offset", content), ("length", end - content):
            reference.external_data.add(key=key, value=str(value))
        encoded = memoryview(reference.SerializeToString())
        return [data[start:first], data[end:stop], encoded]

    pieces = _rewritten(data, 0, len(data), "model", edit, min_bytes) or [data]
    return b"".join(piece for piece in pieces if isinstance(piece, memoryview))


def write_whole(proto: bytes, payload: Callable[[TensorProto], Region], stream: BinaryIO) -> None:
    """Write an ONNX file with the data of its external tensors in it.

    Parameters
    ----------
    proto : the model, serialized
    payload : tells where the data of a tensor lies
    stream : the file to write to
    """

    def edit(data: memoryview, start: int, stop: int) -> list[Piece]:
        tensor = TensorProto.FromString(bytes(data[start:stop]))
        if tensor.data_location != TensorProto.EXTERNAL:
            return []
        region = payload(tensor)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        before = tensor.SerializeToString() + _field_header(_RAW_DATA, len(region))
        return [memoryview(before), region]

    data = memoryview(proto)
    for piece in _rewritten(data, 0, len(data), "model", edit, 0) or [data]:
        if isinstance(piece, Region):
            piece.copy_to(stream)
        else:
            stream.write(piece)


def _rewritten(
    data: memoryview, start: int, stop: int, kind: str, edit: Edit, min_bytes: int, depth: int = 0
) -> list[Piece]:
    """The message data[start:stop] in pieces, its tensors edited; [] if no tensor has changed.

    kind: of the message, a key of _MESSAGES. Messages of fewer than `min_bytes` bytes stay as
    they are.
    """
    if depth > _MAX_DEPTH:
        raise DecodeError(f"more than {_MAX_DEPTH} messages in one another")
    pieces: list[Piece] = []
    done = start
    for number, first, content, end in _fields(data, start, stop):
        inside = _MESSAGES[kind].get(number)
        if inside is None or end - content < min_bytes:
            continue
        if inside == "tensor":
            new = edit(data, content, end)
        else:
            new = _rewritten(data, content, end, inside, edit, min_bytes, depth + 1)
        if not new:
            continue
        header = _field_header(number, sum(map(len, new)))
        pieces += [data[done:first], memoryview(header), *new]
        done = end
    return [*pieces, data[done:stop]] if pieces else []


def _fields(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the content and end of every field of the message data[start:stop].

    Raises DecodeError if that is no message.
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
    for index, byte in enumerate(data[at : min(at + 10, stop)]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise DecodeError(f"no number at byte {at}")


def _field_header(number: int, length: int) -> bytes:
    """What comes before the content of a field of `length` bytes."""
    encoded = bytearray()
    for value in (number << 3 | _LENGTH, length):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)
