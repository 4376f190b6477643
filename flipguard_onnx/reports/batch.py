"""The result of guard_many()."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .guard import GuardReport
from .serialize import FORMAT, jsonable


@dataclass(frozen=True)
class ModelOutcome:
    """What became of one model: a report, or one line that says why not.

    code: the exit code that the command line has for it alone. seconds: wall time, where it ran.
    """

    model: str
    code: int
    seconds: float | None = None
    report: GuardReport | None = None
    error: str | None = None


@dataclass(frozen=True)
class BatchReport:
    """The result of guard_many(): one outcome per model, in the order of the models.

    config: the file that gave options of the command line.
    """

    kind: Literal["guard_many"] = field(default="guard_many", init=False)
    format_version: int = field(default=FORMAT, init=False)
    outcomes: tuple[ModelOutcome, ...]
    config: str | None = None

    @property
    def code(self) -> int:
        """The worst of all."""
        return max(outcome.code for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; every report as it is alone."""
        models = [
            jsonable(outcome) | {"report": outcome.report and outcome.report.to_dict()}
            for outcome in self.outcomes
        ]
        own = {"kind": self.kind, "format_version": self.format_version, "config": self.config}
        return own | {"code": self.code, "models": models}

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_batch

        return render_batch(self)
