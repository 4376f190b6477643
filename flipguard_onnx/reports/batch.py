"""The result of guard_many()."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .guard import GuardReport
from .serialize import FORMAT, jsonable


@dataclass(frozen=True)
class ModelOutcome:
    """What became of one model: a report, or an error.

    Attributes
    ----------
    model : its path
    code : the exit code of the command line for this model alone: 0 where there is a report
    seconds : wall time; None where it did not run
    report : the result of guard()
    error : one line that says what went wrong
    """

    model: str
    code: int
    seconds: float | None = None
    report: GuardReport | None = None
    error: str | None = None


@dataclass(frozen=True)
class BatchReport:
    """The result of guard_many().

    Attributes
    ----------
    outcomes : one per model, in the order of the models
    copied : files that went along with the models of a model folder
    config : the file that gave options of the command line, if one did
    """

    kind: Literal["guard_many"] = field(default="guard_many", init=False)
    format_version: int = field(default=FORMAT, init=False)
    outcomes: tuple[ModelOutcome, ...]
    copied: tuple[str, ...] = ()
    config: str | None = None

    @property
    def code(self) -> int:
        """The highest exit code of all models."""
        return max(outcome.code for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types; each report is what its own `to_dict()` gives."""
        models = [
            jsonable(outcome) | {"report": outcome.report and outcome.report.to_dict()}
            for outcome in self.outcomes
        ]
        return {
            "kind": self.kind,
            "format_version": self.format_version,
            "config": self.config,
            "code": self.code,
            "copied": list(self.copied),
            "models": models,
        }

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_batch

        return render_batch(self)
