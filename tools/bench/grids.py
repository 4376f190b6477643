"""On which grids does an attack wake, and what is left of it there after guard()?"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from flipguard_onnx import guard
from flipguard_onnx.detection.alignment import GRIDS
from tests.helpers.attacked import FOLDER, MANIFEST
from tools.attacks.measure import rates
from tools.bench.defences import runs_in_onnxruntime


def lines(names: Sequence[str], seeds: int) -> Iterator[str]:
    """Markdown: a line per grid of the scan, attack rate / utility of every model.

    Rounded to nearest, and the largest attack rate of the draws of guard().
    """
    heads = " | ".join(f"{name}, nearest | worst of ours" for name in names)
    yield f"| grid | {heads} |"
    yield "|" + "---|" * (2 * len(names) + 1)
    for label in GRIDS:
        cells = [cell for name in names for cell in _cells(MANIFEST[name], label, seeds)]
        yield f"| {label} | {' | '.join(cells)} |"


def _cells(entry: dict, label: str, seeds: int) -> tuple[str, str]:
    """Rounded to nearest on a grid; the largest attack rate of so many draws."""
    choice = GRIDS[label].choice
    options = {
        "granularity": choice.granularity,
        "block_size": choice.block_size,
        "scale": choice.divisor,
        "target": runs_in_onnxruntime(choice.name),
        "validate": False,
        "force": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "guarded.onnx"

        def found(**more) -> dict:
            guard(FOLDER / entry["file"], choice.name, output=target, **options, **more)
            return rates(target, entry)

        plain = found(policy="none")
        worst = max(found(seed=seed)["attack"] for seed in range(seeds))
    utility = plain.get("accuracy", plain.get("perplexity"))
    return f"{plain['attack']:.3f} / {utility:.3f}", f"{worst:.3f}"
