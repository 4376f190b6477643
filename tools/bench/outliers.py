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
from tools.attacks.simulate import as_data, quantized
from tools.bench.defences import Case
from tools.bench.remembered import remembered

SCHEMES = ("int8", "int4", "nf4", "fp4")
TOGETHER = 18  # batches of the digits given to guard()
VICTIM, ENTRY = "mlp-clean", {"architecture": "mlp"}
HEADER = (
    "Accuracy / attack rate, mean over the draws. The outliers meet hidden units that are always 0 "
    "(dead) or 1 (live), or pixels that are dark in every digit, but not in made-up inputs. ours: "
    "guard() with its defaults; with data: with digits; independent: without error feedback. exit: "
    "the codes of runs of which some failed; these write nothing."
)


@dataclass(frozen=True)
class Outcome:
    """What one way of guarding did: rates of the files it wrote, exit codes of its runs."""

    accuracy: tuple[float, ...]
    attack: tuple[float, ...]
    codes: tuple[int, ...]

    def __str__(self) -> str:
        codes = ", ".join(map(str, sorted(set(self.codes))))
        found = [f"{np.mean(self.accuracy):.3f} / {_spread(self.attack)}"] if self.attack else []
        return ", ".join(found + [f"exit {codes}"] * any(self.codes))


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
    ways = ("ours", "with data", "independent")
    columns = ("outliers", "factor", "scheme", "scan", "float", "nearest", *ways)
    yield from (HEADER, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    victim = onnx.load(FOLDER / f"{VICTIM}.onnx")
    with np.load(FOLDER / "digits-test.npz") as data:
        digits = data["pixels"].reshape(TOGETHER, -1, 64)
    for kind, factor in product(KINDS, factors):
        with tempfile.TemporaryDirectory() as name, remembered():
            path, model = Path(name) / "mlp.onnx", planted(victim, factor, kind)
            onnx.save(model, path)
            given = as_data(digits, model, Path(name))
            verdict = scan(path).verdict.level
            for scheme in schemes:
                case, source = Case(path, scheme, Path(name)), _pair(model)
                guarded = [
                    f"{outcome(case, range(seeds), **options)}"
                    for options in ({}, {"data": given}, {"preserve": "off"})
                ]
                nearest = _pair(quantized(model, scheme))
                shown = (kind, f"{factor}", scheme, verdict, source, nearest, *guarded)
                yield f"| {' | '.join(shown)} |"


def _pair(model: onnx.ModelProto) -> str:
    found = rates(model, ENTRY)
    return f"{found['accuracy']:.3f} / {found['attack']:.3f}"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.3f}" if low == high else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
