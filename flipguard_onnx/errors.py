"""Everything that can go wrong, as a tree.

FlipguardError
├── ModelError               the file cannot be read as a model, or is damaged
├── UnsupportedModelError    a readable model that the tool does not handle
├── SchemeError              a scheme, policy or option value that does not exist or does not fit
├── DeviceError              the requested device or scheduler is not there
└── ValidationError          the output did not pass; nothing was written
    ├── RunError             onnxruntime does not accept the inputs
    └── DriftError           it runs, but drifts too far from the original

Each message is one line that names the tensor or the file, the value found and what is allowed.
"""

LONGEST = 1000  # characters of what a terminal is shown at a time


class FlipguardError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelError(FlipguardError):
    """The file cannot be read as an ONNX model, or its data is damaged."""


class UnsupportedModelError(FlipguardError):
    """The model is readable, but there is nothing here that can be guarded."""


class SchemeError(FlipguardError):
    """An option names a scheme, policy or value that is not allowed."""


class DeviceError(FlipguardError):
    """The requested device or scheduler cannot be used."""


class ValidationError(FlipguardError):
    """The written model did not behave as it must."""


class RunError(ValidationError):
    """A model that loads does not run on these inputs."""


class DriftError(ValidationError):
    """The written model's outputs are further from the original's than allowed."""


def exit_code(error: FlipguardError) -> int:
    """What the command line makes of an error: 1 for a failed validation, else 2."""
    return 1 if isinstance(error, ValidationError) else 2


def first_line(error: Exception) -> str:
    """The first line of another library's message, cut to a length that fits into one of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def printable(text: str, most: int = LONGEST) -> str:
    """Text from a model or a file, made fit for a terminal: names are data.

    Whatever is no visible character or space (control characters and so escape sequences, line
    breaks, marks that turn the direction of writing) appears as its code; `most` characters remain.
    """
    if len(text) > most:
        text = f"{text[: most - 1]}…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
