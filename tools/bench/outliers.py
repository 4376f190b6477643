"""What outliers of growing size do to a classifier, rounded to nearest and guarded; no training."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnx

from flipguard_onnx import scan
from flipguard_onnx.errors import FlipguardError, exit_code
from tools.attacks.measure import FOLDER, rates
from tools.attacks.outlier import FACTORS, KINDS, planted
from tools.attacks.simulate import quantized
from tools.bench.defences import Case
from tools.bench.remembered import remembered

SCHEMES = ("int8", "int4", "nf4", "fp4")
VICTIM, ENTRY = "mlp-clean", {"architecture": "mlp"}
HEADER = (
    "Accuracy / attack rate, mean over the draws. The outliers meet hidden units that are always 0 "
    "(dead) or 1 (live), or pixels that are dark in every digit. ours: guard() with its defaults; "
    "independent: without error feedback; exit: the codes of their runs. A run that fails writes "
    "nothing; `-` if all of them did."
)


@dataclass(frozen=True)
class Outcome:
    """What one way of guarding did: rates of every draw, and the exit codes of the runs."""

    accuracy: tuple[float, ...]
    attack: tuple[float, ...]
    codes: tuple[int, ...]

    def __str__(self) -> str:
        if not self.attack:
            return "-"
        return f"{np.mean(self.accuracy):.3f} / {_spread(self.attack)}"

    @property
    def exits(self) -> str:
        return ", ".join(map(str, sorted(set(self.codes))))


def outcome(case: Case, seeds: Sequence[int], **options) -> Outcome:
    """Guard it as a user would, with every seed, and run what was written."""
    found, codes = [], []
    for seed in seeds:
        target = case.folder / "guarded.onnx"
        target.unlink(missing_ok=True)
        try:
            case.guard(target, seed=seed, validate=True, **options)
        except FlipguardError as error:
            codes.append(exit_code(error))
        else:
            codes.append(0)
            found.append(rates(target, ENTRY))
    return Outcome(
        tuple(f["accuracy"] for f in found), tuple(f["attack"] for f in found), tuple(codes)
    )


def lines(
    seeds: int, factors: Sequence[int] = FACTORS, schemes: Sequence[str] = SCHEMES
) -> Iterator[str]:
    """Markdown: a line per kind of outlier, factor and scheme."""
    columns = ("outliers", "factor", "scheme", "scan", "float", "nearest")
    columns += ("ours", "exit", "independent", "exit")
    yield from (HEADER, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    victim = onnx.load(FOLDER / f"{VICTIM}.onnx")
    for kind, factor in product(KINDS, factors):
        with tempfile.TemporaryDirectory() as name, remembered():
            path = Path(name) / "mlp.onnx"
            model = planted(victim, factor, kind)
            onnx.save(model, path)
            verdict = scan(path).verdict
            for scheme in schemes:
                case = Case(path, scheme, Path(name))
                ours = outcome(case, range(seeds))
                independent = outcome(case, range(seeds), preserve="off")
                shown = (
                    kind, f"{factor}", scheme, verdict.level,
                    _pair(model), _pair(quantized(model, scheme)),
                    f"{ours}", ours.exits, f"{independent}", independent.exits,
                )  # fmt: skip
                yield f"| {' | '.join(shown)} |"


def _pair(model: onnx.ModelProto) -> str:
    found = rates(model, ENTRY)
    return f"{found['accuracy']:.3f} / {found['attack']:.3f}"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.3f}" if low == high else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
