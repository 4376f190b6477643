"""Figures of the bench. Needs matplotlib."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tests.helpers.attacked import choice_of
from tools.attacks.measure import FOLDER
from tools.bench.defences import CPU, SCHEMES, Case, initializers
from tools.bench.rows import Row, table

STYLES = {
    "none": ("X", "black"),
    "topk": ("o", "tab:orange"),
    "noise": ("v", "tab:gray"),
    "random": ("s", "tab:brown"),
    "feedback": ("D", "tab:green"),
    "unbiased": ("P", "tab:cyan"),
    "ours": ("*", "tab:blue"),
}


def scatter(rows: Sequence[Row], path: Path) -> None:
    """Attack rate against utility, means over the judged attacks: a panel per scheme."""
    cells = {key: found for key, found in table(rows).items() if _judged(found)}
    schemes = [scheme for scheme in SCHEMES if any(s == scheme for _, s in cells)]
    columns = min(len(schemes), 5)
    lines = -(-len(schemes) // columns)
    figure = Figure(figsize=(3.6 * columns, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    panels, spare = panels[: len(schemes)], panels[len(schemes) :]
    for panel in spare:
        panel.remove()
    for scheme, panel in zip(schemes, panels, strict=True):
        of_scheme = [found for (_, s), found in cells.items() if s == scheme]
        for name in dict.fromkeys(name for found in of_scheme for name in found):
            group = [found[name] for found in of_scheme if name in found]
            x = np.mean([cell.kept(cell.first.float_utility) for cell in group])
            y = np.mean([cell.mean("attack") for cell in group])
            family = name.split("-")[0]
            marker, colour = STYLES[family]
            panel.plot(x, y, marker, color=colour, label=family, markersize=9 - 3 * ("-" in name))
            label = name.removeprefix(f"{family}-") if "-" in name else ""
            panel.annotate(label, (x, y), (3, 3), textcoords="offset points", fontsize=6)
        panel.set_title(scheme)
        panel.set_xlabel("utility, share of the float model's")
        panel.tick_params(labelbottom=True)
    panels[0].set_ylabel("attack rate")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110)


def _judged(found: dict) -> bool:
    return next(iter(found.values())).first.judged


def histogram(clean: str, attacked: str, scheme: str, path: Path) -> None:
    """Where the float weights stand, seen from the level that each one is rounded to.

    Three panels: the clean model rounded to nearest, the attacked one rounded to nearest, the
    attacked one guarded. In gaps between neighbouring levels; beyond 0.5 a weight has crossed.
    """
    panels = (
        ("clean, plain rounding", clean, "none"),
        ("attacked, plain rounding", attacked, "none"),
        ("attacked, guarded", attacked, "unbiased"),
    )
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True)
    for axis, (title, name, policy) in zip(axes, panels, strict=True):
        offsets = _offsets(FOLDER / f"{name}.onnx", scheme, policy)
        axis.hist(offsets, np.linspace(-1, 1, 81), density=True, color="tab:blue")
        axis.axvline(-0.5, color="gray", linewidth=0.7)
        axis.axvline(0.5, color="gray", linewidth=0.7)
        axis.set_title(f"{title}: {np.mean(np.abs(offsets) > 0.5):.0%} crossed", fontsize=10)
        axis.set_xlabel("weight - its level, in gaps")
        axis.set_yticks([])
    figure.suptitle(f"{attacked}, {scheme}", fontsize=10)
    figure.savefig(path, dpi=110)


def _offsets(model: Path, scheme: str, policy: str) -> np.ndarray:
    """Signed distance of every movable weight to its level after guard(), in gaps on that side."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(model, scheme, Path(folder))
        target = Path(folder) / "moved.onnx"
        case.guard(target, policy=policy, seed=0, emit="float")
        moved = initializers(target)
    found = []
    for weight, (kind, grid, before) in zip(case.found, case.grids(), strict=True):
        if kind.choice != choice_of(scheme).filled:
            continue
        margins = grid.analyze(before, CPU)
        after = weight.canonical(moved[weight.name]).astype(np.float32)
        moves = grid.encode(after, CPU).astype(np.int16) - margins.codes
        found.append((margins.offsets - moves)[margins.offsets != 0])
    return np.concatenate(found)
