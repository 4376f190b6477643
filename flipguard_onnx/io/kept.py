"""What is finished of a run, kept in a folder: the same run, repeated, goes on from there.

Kept are the seeds, the inputs that were made up and every weight as it was drawn. All else follows
from the model and the options, so a run that was interrupted and repeated writes the same files as
one that was not.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OptionError

Arrays = dict[str, npt.NDArray[Any]]


class Kept:
    """The results of one run; without a folder nothing is kept.

    Parameters
    ----------
    folder : is made if it is not there; each run has a folder of its own in it
    identity : what makes a run the same: all that its results depend on

    Raises
    ------
    OptionError : the folder cannot be made
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._folder = folder / _digest(json.dumps(identity, sort_keys=True)) if folder else None
        if self._folder:
            try:  # it holds the seeds, which nobody should know before the run has ended
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError(
                    "resume: the folder cannot be made ({found})", path=folder, found=error.strerror
                ) from None

    def load(self, name: str) -> Arrays | None:
        """What was stored under this name, if anything was."""
        return load(self._folder / _digest(name)) if self._folder else None

    def store(self, name: str, arrays: Arrays) -> None:
        """Keep the arrays; whatever ends the run, they are there as a whole or not at all."""
        if self._folder:
            path = self._folder / _digest(name)
            unfinished = path.with_suffix(".unfinished")
            store(unfinished, arrays)
            unfinished.replace(path)

    def load_or_make(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What was stored under this name; else what `make` returns, which is stored."""
        arrays = self.load(name)
        if arrays is None:
            self.store(name, arrays := make())
        return arrays

    def remove(self) -> None:
        """Remove what was kept, once the run has ended well."""
        if self._folder:
            shutil.rmtree(self._folder)
            with suppress(OSError):  # others keep theirs there
                self._folder.parent.rmdir()


NOTHING_KEPT = Kept(None, {})


def store(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays, under whatever names they have; no type may be one of Python objects."""
    with path.open("wb") as file:
        np.savez(file, np.array(list(arrays), np.str_), *arrays.values())


def load(path: Path) -> Arrays | None:
    """What was stored; None where there is no such file, or one that cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, *values = (file[key] for key in file.files)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        return None
    return dict(zip(names.tolist(), values, strict=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
