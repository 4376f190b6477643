"""Token ids from files of text, by the tokenizer that lies beside the model."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import runtime
from ..errors import ModelError, OptionError, ValidationError
from ..io.model import Model
from .inputs import Feed
from .text_model import TextModel

TEXT_FILES = (".txt", ".jsonl")

TOKENIZER = "tokenizer.json"

LENGTH = 256  # tokens of a sequence, unless the model takes another number only

SEQUENCES = 128  # at most; of a longer text some, spread evenly

TEXT_LIMIT = 16 << 20  # bytes of a file


def is_text(path: Path) -> bool:
    """Whether a file is text, judging by its name."""
    return path.suffix.lower() in TEXT_FILES


def text_feeds(path: Path, source: Model, text: TextModel | None) -> list[Feed]:
    """The text of a file as token ids [sequences, LENGTH], one text after the other.

    Parameters
    ----------
    path : a .txt file in UTF-8, or a .jsonl file with {"text": ...} in every line
    source : the model, with TOKENIZER beside it or one folder up
    text : what is known of its inputs

    Raises
    ------
    ModelError
        When the file or the tokenizer cannot be read, or the model takes more than text.
    OptionError
        When the tokenizer or the package that reads it is not there.
    """
    if text is None:
        raise ModelError("the model takes no token ids, so text is no input for it", path=path)
    beside = text.determined
    if lacking := [i.name for i in text.inputs if i.name not in beside | {text.ids.name}]:
        raise ModelError(
            "text says nothing of the input {tensor!r}",
            path=path,
            tensor=lacking[0],
            allowed="an .npz file with arrays for all inputs",
        )
    texts = _texts(path)
    ids = _tokens(texts, _tokenizer(source, path), path)
    rows, length = (n if isinstance(n, int) else None for n in text.ids.dims)
    length = length or min(LENGTH, len(ids) // (rows or 1)) or 1
    least = (rows or 1) * length
    if len(ids) < least:
        raise ModelError(
            "holds {found} tokens", path=path, found=len(ids), allowed=f"{least} or more"
        )
    batches = ids[: len(ids) // least * least].reshape(-1, rows or 1, length)
    chosen = np.linspace(0, len(batches) - 1, min(len(batches), SEQUENCES)).astype(int)
    batches = batches[chosen].astype(text.ids.dtype)
    return [{text.ids.name: each} for each in (batches if rows else [np.concatenate(batches)])]


def _texts(path: Path) -> list[str]:
    """The texts in a file that are more than white space; at least one."""
    try:
        if (size := path.stat().st_size) > TEXT_LIMIT:
            raise ModelError(
                "holds {found:,} bytes of text",
                path=path,
                found=size,
                allowed=f"up to {TEXT_LIMIT:,}, of which {SEQUENCES * LENGTH:,} tokens are used",
            )
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(
            "byte {found:#x} at offset {offset} is not UTF-8",
            path=path,
            found=error.object[error.start],
            offset=error.start,
            allowed="text in UTF-8",
        ) from None
    except OSError as error:
        raise ModelError("cannot be read: {found}", path=path, found=error.strerror) from None
    texts = [content] if path.suffix.lower() == ".txt" else _of_lines(content, path)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ModelError("holds no text", path=path)
    return texts


def _of_lines(content: str, path: Path) -> list[str]:
    """The texts of the lines that are not blank."""
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, LookupError, TypeError, RecursionError):
            texts.append(None)
        if not isinstance(texts[-1], str):
            raise ModelError(
                "line {line} is {found}",
                path=path,
                line=number,
                found=repr(line[:60]),
                allowed='an object with a string "text", on one line',
            )
    return texts


def _tokenizer(source: Model, path: Path) -> Path:
    """Where the tokenizer lies: beside the model, or one folder up, as for transformers.js."""
    folder = source.path.absolute().parent
    for place in (folder, folder.parent):
        if (file := place / TOKENIZER).is_file():
            return file
    raise OptionError(
        "text needs a tokenizer; there is no {found} in {folder} or one folder up",
        path=path,
        found=TOKENIZER,
        folder=folder,
        allowed="a model with one, or an .npz file with token ids",
    )


def _tokens(texts: list[str], tokenizer: Path, path: Path) -> npt.NDArray[np.int64]:
    if not find_spec("tokenizers"):
        raise OptionError(
            "text needs a package that is not installed: pip install 'flipguard-onnx[text]'",
            path=path,
        )
    try:
        return runtime.tokenized(tokenizer, texts)
    except (runtime.RemoteError, ValidationError) as error:
        raise ModelError(
            "does not tokenize the text: {found}", path=tokenizer, found=str(error)
        ) from None
