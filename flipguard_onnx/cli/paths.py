"""The files of a command: none that it writes may be one that it reads or writes as well."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product
from pathlib import Path

from ..errors import OptionError
from ..io.publish import check_report


def check_files(
    reports: Mapping[str, Path | None],
    *,
    models: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    data: Path | None = None,
    config: str | None = None,
) -> None:
    """Require that every report, and every output, has a place of its own.

    Parameters
    ----------
    reports : by their options; None where it is not asked for
    models : that are read
    outputs : models that will be written
    data : .npz file with inputs, or folder of them
    config : the file that gave options, if one did

    Raises
    ------
    OptionError : two files are one, under whatever spelling
    ModelError : a report may not go where it would, or there are no inputs at `data`
    """
    written = [(name, path) for name, path in reports.items() if path]
    made = [("the output", path) for path in outputs]
    settings = [("--config", Path(config))] if config else []
    samples = []
    if data:
        from ..calibration.inputs import npz_files  # loads onnx, which --help can do without

        samples = [("--data", path) for path in npz_files(data)]
    pairs = chain(
        combinations(written, 2),
        product(written, [*made, *samples, *settings, *(("the model", path) for path in models)]),
        product(made, [*samples, *settings]),
    )
    for (name, path), (other, place) in pairs:
        if _meet(path, place):
            raise OptionError(
                "{name} and {other} are one file; each needs its own",
                path=path,
                name=name,
                other=other,
            )
    for _, path in written:
        check_report(path)


def _meet(path: Path, other: Path) -> bool:
    """Whether both lead to one file, or `other` is to be below `path`; streams may be shared."""
    if path.exists():
        return path.is_file() and other.exists() and path.samefile(other)
    place, below = (Path(os.path.realpath(each)) for each in (path, other))
    return place in (below, *below.parents)
