"""What lasts as long as one run: the opened model, where its outputs go, folders, the kernels."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from .. import __version__
from ..calibration.inputs import feeds_sha256, npz_files
from ..errors import FlipguardError, ModelError, OptionError
from ..io.kept import NOTHING_KEPT, Kept
from ..io.model import INLINE_LIMIT, Model
from ..io.publish import WORKSPACE, Finished, check_target, workspace
from ..io.writer import Output
from ..opening import open_folded
from ..progress import Progress, silent
from ..quantization.kernels import compiling, get_backend
from ..quantization.kernels.protocol import Kernels
from ..quantization.rounding import Policy
from ..runtime import require_openable
from .options import GuardOptions, StrPath, output_paths

BESIDE = "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"  # tokenizers, settings

HIDDEN = re.compile(rf"[^\s'\"(]*/{WORKSPACE.pattern}/[^\s'\":;,)]*")  # a file of a workspace


class Run:
    """One run of guard(); everything that it leaves half done is removed when it ends.

    model: as it was opened. targets: where each kind of output will go. kernels: on the device.
    kept: what was finished when the same run was interrupted.
    """

    def __init__(
        self,
        model: Model,
        targets: dict[str, Path],
        options: GuardOptions,
        progress: Progress,
        kernels: Kernels,
        stack: ExitStack,
    ) -> None:
        self.model = model
        self.targets = targets
        self.options = options
        self.progress = progress
        self.kernels = kernels
        self.kept = _kept(model, options)
        self._stack = stack
        self._external = model.size > INLINE_LIMIT or bool(model.data_sha256)

    @cached_property
    def folder(self) -> Path:
        """A temporary folder beside the outputs; there is none before it is asked for."""
        beside = next(iter(self.targets.values())).parent
        return self._stack.enter_context(workspace(beside))

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds to try in turn."""
        found = self.kept.load_or_make(
            "seeds", lambda: {"seeds": np.array([str(seed) for seed in self.options.seeds()])}
        )
        return [int(seed) for seed in found["seeds"]]

    @property
    def policy(self) -> Policy:
        """How codes are chosen."""
        return Policy(self.options.policy, self.options.tau, self.options.ratio)

    def output(self, folder: Path, kind: str) -> Output:
        """A model to be written below `folder`, under its final name if it is to be published."""
        return Output(folder / kind, self.targets.get(kind), self._external)

    def finish(
        self, outputs: dict[str, Output]
    ) -> tuple[list[Finished], dict[str, int], dict[str, str]]:
        """The outputs, by kind, ready to be published; their sizes and digests by path.

        Raises ModelError when the input has changed meanwhile.
        """
        self.model.require_unchanged()
        finished = [
            (output, output.finished(target))
            for kind, target in self.targets.items()
            for output in [outputs[kind]]
        ]
        sizes = {str(target): outputs[kind].size for kind, target in self.targets.items()}
        digests = {
            str(place): output.sha256(file)
            for output, each in finished
            for place, file in each.places.items()
        }
        return [each for _, each in finished], sizes, digests


@contextmanager
def open_run(
    model: StrPath | onnx.ModelProto,
    output: StrPath | None,
    options: GuardOptions,
    progress: Progress | None,
) -> Iterator[Run]:
    """Open the model and check where its outputs may go.

    Raises ModelError when the model cannot be read or an output may not be written, OptionError
    for a ModelProto without `output`.
    """
    progress = progress or silent
    kernels = get_backend(options.device)
    with ExitStack() as stack:
        stack.enter_context(compiling(lambda: progress("compiling the kernels, only once", 0, 1)))
        data = npz_files(options.data_path) if options.data_path else []
        opened = _open(model, output, stack)
        stack.enter_context(naming(opened.path))
        targets = output_paths(opened.path, output, options.scheme, options.emit)
        inputs = [opened.path, *(opened.path.parent / name for name in opened.data_sha256)]
        inputs += [*data, *beside(opened.path)]
        for target in targets.values():
            check_target(target, inputs, options.force)
        if _runs_models(options):
            require_openable(opened.path, *targets.values())
        yield Run(opened, targets, options, progress, kernels, stack)


def _kept(model: Model, options: GuardOptions) -> Kept:
    """What was finished when the same run was interrupted, if such things are kept."""
    if options.resume is None:
        return NOTHING_KEPT
    identity = {
        "version": __version__,
        "model": [model.sha256, model.data_sha256],
        "data": feeds_sha256(options.data_path) if options.data_path else None,
        "options": options.record(),
        "seed": options.seed,
    }
    return Kept(Path(options.resume), identity)


def beside(model: Path) -> list[Path]:
    """The tokenizer and the settings in a model's folder."""
    return [file for pattern in BESIDE for file in model.parent.glob(pattern)]


@contextmanager
def naming(model: Path) -> Iterator[None]:
    """Let errors name the model, not the hidden files that a run makes of it."""
    try:
        yield
    except FlipguardError as error:
        if isinstance(error.found, str):
            error.found = HIDDEN.sub(lambda _: str(model), error.found)
        error.at(model)
        raise


def _runs_models(options: GuardOptions) -> bool:
    """Whether the run needs onnxruntime."""
    needs = options.validate, options.activations, options.int8_share
    return any(needs) or options.feedback_inputs != "off"


def _open(model: StrPath | onnx.ModelProto, output: StrPath | None, stack: ExitStack) -> Model:
    if not isinstance(model, onnx.ModelProto):
        return open_folded(model)
    if output is None:
        raise OptionError("a ModelProto has no path to write beside; output must be given")
    folder = stack.enter_context(workspace(Path(output).parent))
    path = folder / "model.onnx"
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise ModelError("the ModelProto cannot be serialized: {found}", found=str(error)) from None
    return open_folded(path)
