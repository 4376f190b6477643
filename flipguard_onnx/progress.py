"""Progress: what a long run tells whoever watches it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, bytes (or steps) done, and in all


def silent(stage: str, done: int, total: int) -> None:
    """The progress that nobody watches."""


def meter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Takes the bytes done one after the other and reports their sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    add(0)
    return add
