"""Samples: inputs that the model accepts, searched for once per run, and what it makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import runtime
from ..errors import LoadError, OptionError, RunError, UnsupportedModelError, ValidationError
from ..io.model import Model
from .embeddings import text_model
from .inputs import BATCH, NONE_FIT, Feed, cut_up, load_feeds, made_up_feeds, signature
from .synthetic import decoder, synthetic_feeds
from .text_files import is_text, text_feeds

Array = npt.NDArray[Any]

SEED = 1  # of texts; error feedback sees others

OUTPUTS = 512 << 20  # bytes that are kept at most, unless a single sample has more


@dataclass(frozen=True)
class Found:
    """Samples, and the outputs of the original for each of them, in the order of its outputs.

    Of many samples with large outputs, these are some, spread evenly.

    names: of the outputs. problem: why no samples were found, or that the outputs for these are not
    all finite.
    """

    feeds: list[Feed]
    outputs: list[list[Array]]
    names: list[str]
    problem: str = ""


class Samples:
    """The samples of one model: those of `data`, else the first made-up ones that it accepts.

    Nothing is loaded or run before it is asked for; the model is loaded into one session, and run
    on each sample once, for everything that a run needs it for.

    Parameters
    ----------
    source : the original; it is run as it stands in its file
    data : .npz file, or a folder of them, or a file of text; None makes inputs up
    without : the options with which a run needs no inputs, as advice; "" where there are none
    takes_data : whether `data` could be given, as advice
    """

    def __init__(
        self, source: Model, data: Path | None, without: str = "", takes_data: bool = True
    ) -> None:
        self.source = source
        self.data = data
        self.without = without
        self._takes_data = takes_data
        self._failure: ValidationError | UnsupportedModelError | None = None

    @cached_property
    def session(self) -> runtime.Session:
        """The original in onnxruntime.

        Raises UnsupportedModelError when onnxruntime does not accept it, ValidationError when it
        cannot be loaded for another reason.
        """
        try:
            return runtime.open_session(self.source.path, exact=True, size=self.source.size)
        except LoadError as error:
            reason = str(error).removeprefix(f"{error.path}: ")
            raise UnsupportedModelError(reason, path=error.path) from None

    @cached_property
    def given(self) -> list[Feed]:
        """The feeds of `data`, cut up where they hold many samples; none without.

        Raises ModelError when they do not fit the model.
        """
        if not self.data:
            return []
        text = text_model(self.source)
        if is_text(self.data):
            feeds = text_feeds(self.data, self.source, text)
        else:
            feeds = load_feeds(self.data, self.source.proto, text.determined if text else ())
        if text:
            text.require_known(feeds, self.data)
            text.require_all_caches(feeds, self.data)
        inputs = signature(self.source.proto)
        parts = (part for feed in feeds for part in cut_up(feed, inputs))
        return [text.filled(part) for part in parts] if text else list(parts)

    @property
    def accepted(self) -> list[Feed]:
        """Feeds on which the model runs, whatever it returns; given ones are not tried here."""
        return self.given or self.found.feeds

    @property
    def description(self) -> str:
        """Where they come from, for a report."""
        if self.data:
            return str(self.data)
        return "texts that the model wrote" if self._texts else "made up from the graph's signature"

    def require(self) -> Found:
        """The samples and what the original makes of them.

        Raises OptionError, with advice, when there are none on which it runs and returns finite
        numbers; ModelError when those of `data` cannot be read or do not fit.
        """
        try:
            if self.found.feeds and not self.found.problem:
                return self._texts or self.found
        except (ValidationError, UnsupportedModelError) as error:  # with whatever inputs
            reason = str(error).removeprefix(f"{error.path}: ")
            raise self._refused("the original cannot be run", reason, give=False) from None
        where = "the inputs of --data" if self.data else "made-up inputs"
        raise self._refused(
            f"the original does not run on {where}",
            self.found.problem,
            give=self._takes_data and not self.data,
        )

    def _refused(self, problem: str, reason: str, give: bool) -> OptionError:
        """What `require` raises; give: whether other inputs could help."""
        ways = ["give real ones with --data"] * give
        ways += [f"go without inputs ({self.without})"] * bool(self.without)
        advice = f"; {' or '.join(ways)}" if ways else ""
        return OptionError(problem + " ({found})" + advice, path=self.source.path, found=reason)

    @property
    def found(self) -> Found:
        """The samples, whatever the original makes of them; no feeds where it runs on none.

        Raises ValidationError or UnsupportedModelError, each time anew, where the original cannot
        be run at all.
        """
        if self._failure:
            raise self._failure
        try:
            return self._searched
        except (ValidationError, UnsupportedModelError) as error:
            self._failure = error
            raise

    def release(self) -> None:
        """Free the memory of the loaded original, once its outputs are known."""
        self.__dict__.pop("session", None)

    @cached_property
    def _searched(self) -> Found:
        if self.data:
            return self._run(self.given)
        best = Found([], [], [], NONE_FIT)
        for feeds in self.candidates():
            found = self._run(feeds)
            if found.feeds and not found.problem:
                return found
            best = best if best.feeds else found
        return best

    @cached_property
    def _texts(self) -> Found | None:
        """As many samples of text that a decoder itself writes; None of another model.

        On tokens drawn at random it is as far from what it knows as its users never are.
        """
        found = self.found
        text = None if self.data else decoder(self.source, found.feeds[0])
        if text is None:
            return None
        count, name = len(found.feeds), text.ids.name
        texts = synthetic_feeds(self.source, self.session, found.feeds[0], count, count, SEED)
        split = [i.name for i in signature(self.source.proto) if i.dims[:1] == (BATCH,)]
        written = self._run(
            [
                {n: v[row : row + 1] if n in split else v for n, v in feed.items()}
                for feed in texts
                for row in range(len(feed[name]) if name in split else 1)
            ]
        )
        return None if written.problem else written

    def candidates(self) -> Iterator[list[Feed]]:
        """Made-up feeds that the model may accept; first those with empty caches, if it has any."""
        text = text_model(self.source)
        if text and (text.past or text.table is not None):
            yield from text.starting(made_up_feeds(self.source.proto, self.source.size))
        yield from made_up_feeds(self.source.proto, self.source.size)

    def _run(self, feeds: list[Feed]) -> Found:
        try:
            outputs = [self.session.run(None, feed) for feed in feeds[:1]]
            size = sum(values.nbytes for some in outputs for values in some)
            feeds = feeds[:: max(1, -(-len(feeds) * size // OUTPUTS))]
            outputs += [self.session.run(None, feed) for feed in feeds[1:]]
        except RunError as error:
            return Found([], [], [], str(error))
        names = self.session.outputs
        for name, values in zip(names, zip(*outputs, strict=True), strict=True):
            if not all(map(finite, values)):
                return Found(feeds, outputs, names, f"output {name!r} holds NaN or infinity")
        return Found(feeds, outputs, names)


def finite(values: Array) -> bool:
    """Whether all floats are finite, but for -inf beside others: what a mask makes of logits.

    Other types always are.
    """
    if not np.issubdtype(values.dtype, np.floating):
        return True
    are_finite = np.isfinite(values)
    return bool(are_finite.all() or (are_finite.any() and (are_finite | np.isneginf(values)).all()))
