"""Everything that can go wrong, as a tree.

FlipguardError
├── ModelError               the file cannot be read as a model, or is damaged
├── UnsupportedModelError    a readable model that the tool does not handle
├── OptionError              an option or argument that does not exist or does not fit
│   └── SchemeError          a scheme or policy that does not exist or does not fit
├── DeviceError              the requested device or scheduler is not there
└── ValidationError          the output did not pass; nothing was written
    ├── LoadError            onnxruntime does not accept the model
    ├── RunError             onnxruntime does not accept the inputs
    └── DriftError           it runs, but drifts too far from the original

An error carries its data (`path`, `tensor`, `found`, `allowed`), and its message is made from them:
one line that names the tensor or the file, the value found and what is allowed.
"""

import os
from typing import Any, Self

LONGEST = 1000  # characters of what a terminal is shown at a time


class FlipguardError(Exception):
    """Base of every error that this package raises on purpose.

    Parameters
    ----------
    problem : what is wrong, as a format string: {tensor}, {tensor!r}, {found} stand for the data.
        Without data it is taken as it is.
    path : the file that it is about; the message begins with it
    tensor : the name of the tensor that it is about
    found : the value found
    allowed : what would be right, in words; the message ends with it
    details : whatever else the message names, by the names that stand for them in it

    Examples
    --------
    >>> error = ModelError("tensor {tensor!r} has {found} axes", tensor="w", found=40,
    ...                    allowed="up to 32")
    >>> print(error.at("m.onnx"))
    m.onnx: tensor 'w' has 40 axes; allowed: up to 32
    >>> error.tensor, error.found, error.allowed
    ('w', 40, 'up to 32')
    """

    def __init__(
        self,
        problem: str,
        /,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        found: Any = None,
        allowed: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(problem)
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.found = found
        self.allowed = allowed
        self.details = details
        self.advice = ""

    def at(self, path: str | os.PathLike[str]) -> Self:
        """Add the file that the error is about, unless it has one; returns the error itself."""
        if self.path is None:
            self.path = os.fspath(path)
        return self

    def advise(self, advice: str) -> Self:
        """Add what may help; returns the error itself."""
        self.advice = advice
        return self

    def __str__(self) -> str:
        problem = str(self.args[0])
        if self.tensor is not None or self.found is not None or self.details:
            problem = problem.format(tensor=self.tensor, found=self.found, **self.details)
        head = "" if self.path is None else f"{self.path}: "
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        return head + problem + allowed + (f"; {self.advice}" if self.advice else "")


class ModelError(FlipguardError):
    """The file cannot be read as an ONNX model, or its data is damaged."""


class UnsupportedModelError(FlipguardError):
    """The model is readable, but there is nothing here that can be guarded."""


class OptionError(FlipguardError):
    """An option or an argument has a value that is not allowed, or does not fit the others."""


class SchemeError(OptionError):
    """A scheme or a policy does not exist, or does not fit the other options."""


class DeviceError(FlipguardError):
    """The requested device or scheduler cannot be used."""


class ValidationError(FlipguardError):
    """The written model did not behave as it must."""


class LoadError(ValidationError):
    """onnxruntime does not accept a model."""


class RunError(ValidationError):
    """A model that loads does not run on these inputs."""


class DriftError(ValidationError):
    """The written model's outputs are further from the original's than allowed."""


def exit_code(error: FlipguardError) -> int:
    """What the command line makes of an error: 1 for a failed validation, else 2."""
    return 1 if isinstance(error, ValidationError) else 2


def first_line(error: Exception) -> str:
    """The first line of another library's message, cut to 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def printable(text: str, max_chars: int = LONGEST) -> str:
    """Text from a model or a file, made fit for a terminal: names are data.

    Whatever is not a visible character or a space (control characters and with them escape
    sequences, line breaks, marks that turn the direction of writing) is shown as its code; at most
    `max_chars` characters remain.
    """
    if len(text) > max_chars:
        text = f"{text[: max_chars - 1]}…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
