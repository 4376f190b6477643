"""Progress on the terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal; a line per stage elsewhere; nothing when quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with click.progressbar(length=1, file=sys.stderr) as bar:

            def draw(stage: str, done: int, total: int) -> None:
                if done == 0:  # a new stage: its time left is not that of the one before
                    bar.start = bar.last_eta = time.time()
                    bar.avg, bar.pos, bar.finished = [], 0, False
                bar.label, bar.length = f"{stage}{_amount(done, total)}", total
                bar.update(done - bar.pos)
                bar.render_progress()

            yield draw
    else:

        def line(stage: str, done: int, total: int) -> None:
            if done == 0:
                click.echo(f"{stage} ...", err=True)

        yield line


def _amount(done: int, total: int) -> str:
    """How much is done, where the total is so large that it must be bytes."""
    return f" {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total > 1e6 else ""
