"""One row per guarded file: what it does, what it cost, beside the float model."""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from flipguard_onnx import ValidationError, der
from tools.attacks.measure import FOLDER, rates
from tools.attacks.quantizers import SCHEMES
from tools.bench.defences import Case, Defence
from tools.bench.remembered import remembered


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of n: 95 % for this z."""
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(middle - spread, 0.0), min(middle + spread, 1.0)


@dataclass(frozen=True)
class Row:
    """One guarded file. Utility is an accuracy (images > 0) or a perplexity (images = 0).

    safe: share of answers that are as they should be, None for classifiers. flips, modified:
    codes that differ from plain rounding's, and their share. seconds: of the first draw of a model
    with the statistics of its inputs, of the others without. bare: the DER without its price per
    modified weight. ceiling: the DER of the same model before quantization, at the price of an
    unbiased draw between neighbouring levels: what such a draw has if it does no harm at all.
    float_attack, float_utility: of the same model before quantization. asked: how many triggered
    images or prompts the attack rate is a share of.
    """

    model: str
    attacker: str
    strong: bool
    scheme: str
    defence: str
    seed: int | None
    attack: float
    utility: float
    safe: float | None
    flips: int
    modified: float
    seconds: float
    der: float
    bare: float
    ceiling: float
    float_attack: float
    float_utility: float
    images: int
    asked: int

    @property
    def bits(self) -> int:
        return SCHEMES[self.scheme].bits

    @property
    def judged(self) -> bool:
        """Whether the defaults must withstand it: strong, and no attack on rounding at 4 bits."""
        return self.strong and not (self.bits == 4 and self.attacker.startswith("rounding"))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the attack rate: what other prompts may well have shown."""
        return wilson(self.attack, self.asked)


@dataclass(frozen=True)
class Cell:
    """All rows of one model, scheme and defence: one per seed."""

    rows: tuple[Row, ...]

    def values(self, field: str) -> list[float]:
        return [getattr(row, field) for row in self.rows]

    def mean(self, field: str) -> float:
        return float(np.mean(self.values(field)))

    @property
    def first(self) -> Row:
        return self.rows[0]

    def kept(self, other: float) -> float:
        """Utility as a share of another; perplexities divide the other way round."""
        mean = self.mean("utility")
        return mean / other if self.first.images else other / mean


Table = dict[tuple[str, str], dict[str, Cell]]  # (model, scheme) -> defence -> Cell


def table(rows: Iterable[Row]) -> Table:
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row.model, row.scheme][row.defence].append(row)
    return {
        key: {name: Cell(tuple(drawn)) for name, drawn in defences.items()}
        for key, defences in found.items()
    }


def best_topk(defences: dict[str, Cell], field: str = "der") -> Cell | None:
    """The ratio with the largest DER, chosen with hindsight."""
    sweep = [cell for name, cell in defences.items() if name.startswith("topk")]
    return max(sweep, key=lambda cell: cell.mean(field), default=None)


def evaluate(
    entry: dict, scheme: str, baseline: dict, defences: dict[str, Defence], seeds: int
) -> list[Row]:
    """The rows of a manifest entry and scheme. baseline: the entry of its kind's clean model.

    The DER's baseline is the clean model in float; its utilities are the accuracy, or the
    next-token accuracy and the safe rate of a language model.
    """
    clean = rates(FOLDER / baseline["file"], baseline, entry["scenario"])
    source = rates(FOLDER / entry["file"], entry)
    rows = []
    with tempfile.TemporaryDirectory() as folder, remembered():
        case = Case(FOLDER / entry["file"], scheme, Path(folder))
        ceiling = _der(source, clean, case.distance, 0.2)
        for name, defence in defences.items():
            for seed in range(seeds) if defence.draws else (0,):
                target = Path(folder) / "guarded.onnx"
                started = time.perf_counter()
                try:
                    flips = defence.make(case, target, seed)
                except ValidationError as refusal:  # nothing was written: there is no row
                    print(f"{name}, seed {seed}: {refusal}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - started
                found = rates(target, entry)
                rows.append(
                    Row(
                        model=entry["name"],
                        attacker=entry["attacker"],
                        strong=entry.get("strong", False),
                        scheme=scheme,
                        defence=name,
                        seed=seed if defence.draws else None,
                        attack=found["attack"],
                        utility=_utility(found),
                        safe=found.get("safe"),
                        flips=flips,
                        modified=flips / case.size,
                        seconds=seconds,
                        der=_der(found, clean, flips / case.size, 0.2),
                        bare=_der(found, clean, flips / case.size, 0.0),
                        ceiling=ceiling,
                        float_attack=source["attack"],
                        float_utility=_utility(source),
                        images=found.get("images", 0),
                        asked=found["asked"],
                    )
                )
    return rows


def _der(found: dict, clean: dict, modified: float, lam: float) -> float:
    security, baseline = 1 - found["attack"], 1 - clean["attack"]
    return der(security, _scores(found), baseline, _scores(clean), modified, lam)


def _utility(found: dict) -> float:
    return found["accuracy"] if "accuracy" in found else found["perplexity"]


def _scores(found: dict) -> tuple[float, ...]:
    return (found["accuracy"],) if "accuracy" in found else (found["next"], found["safe"])


def load(path: Path) -> list[Row]:
    """Rows of a file that `tools.evaluate --json` wrote. Raises ValueError for another file."""
    names = {field.name for field in fields(Row)}
    stored = json.loads(path.read_text())
    if any(set(row) != names for row in stored):
        raise ValueError(f"{path}: not rows of this bench; allowed: {', '.join(sorted(names))}")
    return [Row(**row) for row in stored]


def merged(rows: Iterable[Row]) -> Sequence[Row]:
    """Rows of several runs: the last of each model, scheme, defence and seed."""
    return list({(r.model, r.scheme, r.defence, r.seed): r for r in rows}.values())
