"""The result of a scan or a guard as one HTML file."""

from collections.abc import Sequence

from .guard import GuardReport, Tensor
from .scan import Alignment, Scan, ScannedTensor, Verdict
from .svg import (
    Cell,
    Layer,
    Page,
    Section,
    bars,
    count,
    figure,
    heat_section,
    percent,
    share,
    skipped_section,
)
from .text import megabytes
from .validation import Validation, pooled

TONES = {"clean": "good", "suspicious": "warn", "aligned": "bad"}

IDENTITY = ("name", "operator", "shape", "weights")

STANDING = ("verdict", "grid", "near", "peak", "edge", "collapse", "outlier", "budget")

FLIPPED = ("scheme", "flipped", "expected", "furthest", "feedback")

LEFT = ("budget", "left to choose", "random", "scan", "strength")


def scan_html(scan: Scan) -> str:
    """The page of a scan."""
    sections = [
        Section(
            "Where the weights stand, grid by grid",
            "All judged tensors together. Near: share of the weights within a tenth of a half-gap "
            "of a decision boundary; evenly spread weights have 10 %. Placebo: the same on grids "
            "whose scales no quantizer would choose. Peak and edge: what stands together on this "
            "grid and on none of its placebos.",
            head=("grid", "weights", "near", "placebo", "peak", "at", "edge", "collapse"),
            rows=tuple(
                (
                    a.grid,
                    f"{a.weights:,}",
                    percent(a.near),
                    percent(a.near_placebo),
                    percent(a.peak),
                    f"{a.peak_at:.2f}",
                    percent(a.edge),
                    percent(a.collapse),
                )
                for a in scan.alignments
            ),
        )
    ]
    judged = [tensor for tensor in scan.tensors if tensor.alignments]
    if judged and scan.alignments:
        grids = [a.grid for a in scan.alignments]
        shown = (*scan.verdict.grids, _strongest(scan.alignments).grid)[0]
        index = grids.index(shown)
        rows = [(t.name, t.alignments[index].histogram) for t in judged]
        sections.append(heat_section(f"on {shown}", rows))
    sections.append(
        _budget_section(
            [(a.grid, a.budget.nearest, a.budget.chosen, a.budget.random) for a in scan.alignments]
        )
    )
    page = Page(
        scan.input,
        "Was this model prepared for a quantizer?",
        (_verdict(scan.verdict),),
        _file_facts(scan.input_sha256, scan.input_data_sha256, scan.input_bytes),
        tuple(sections),
        IDENTITY + STANDING,
        tuple(map(_scanned, scan.tensors)),
        skipped_section(scan.skipped),
        _footer(scan),
    )
    return page.render()


def guard_html(report: GuardReport) -> str:
    """The page of a guard."""
    scanned = {tensor.name: tensor for tensor in report.scan.tensors} if report.scan else {}
    pairs = [(tensor, scanned.get(tensor.name)) for tensor in report.tensors]
    heat = [
        (tensor.name, alignment.histogram)
        for tensor, found in pairs
        if (alignment := _own_grid(tensor, found, report.granularity))
    ]
    flips = [
        (tensor.name, _expected(tensor, found, report.granularity), _flipped(tensor))
        for tensor, found in pairs
    ]
    sections = [heat_section("before the guard, each on the grid of its scheme", heat)]
    sections.append(
        Section(
            "Flipped weights, layer by layer",
            "Pale: the share that a draw is expected to move across a boundary, from where the "
            "weights stood (25 % where they are spread evenly). Dark: the share that was moved; "
            "error feedback moves more.",
            bars(flips),
        )
    )
    if report.validation:
        sections.append(_drift_section(report.validation))
    if left := report.budget:
        row = (report.scheme, left.nearest, left.chosen, left.random)
        sections.append(_budget_section([row]))
    page = Page(
        report.input,
        "Guarded against quantization-conditioned backdoors",
        (_outcome(report), *((_verdict(report.scan.verdict),) if report.scan else ())),
        (
            *_file_facts(report.input_sha256, report.input_data_sha256, report.input_bytes),
            *_run_facts(report),
        ),
        tuple(sections),
        IDENTITY + FLIPPED + LEFT,
        tuple(_guarded(tensor, found, report.granularity) for tensor, found in pairs),
        skipped_section(report.skipped),
        _footer(report),
    )
    return page.render()


def _scanned(tensor: ScannedTensor) -> Layer:
    cells = [*_identity(tensor.name, tensor.op, tensor.shape, tensor.weights)]
    cells.append(Cell(tensor.verdict.level))
    if tensor.alignments:
        at = _strongest(tensor.alignments)
        cells.append(Cell(at.grid))
        cells += [share(value) for value in (at.near, at.peak, at.edge, at.collapse)]
        cells += [figure(at.outlier), figure(at.budget.nearest)]
    else:
        cells += [Cell("")] * 7
    return Layer(tuple(cells), tuple((a.grid, a.histogram) for a in tensor.alignments))


def _guarded(tensor: Tensor, found: ScannedTensor | None, granularity: str) -> Layer:
    cells = [*_identity(tensor.name, tensor.op, tensor.shape, tensor.weights), Cell(tensor.scheme)]
    cells += [share(_flipped(tensor)), share(_expected(tensor, found, granularity))]
    cells.append(count(tensor.furthest or 0))
    cells.append(Cell("none") if tensor.gain is None else figure(min(tensor.gain, 1.0), "x"))
    budget = tensor.budget
    cells += (
        [figure(value) for value in (budget.nearest, budget.chosen, budget.random)]
        if budget
        else [Cell("")] * 3
    )
    cells += [Cell(found.verdict.level), share(found.verdict.strength)] if found else [Cell("")] * 2
    alignments = found.alignments if found else ()
    return Layer(tuple(cells), tuple((a.grid, a.histogram) for a in alignments))


def _identity(name: str, op: str, shape: Sequence[int], weights: int) -> tuple[Cell, ...]:
    return Cell(name), Cell(op), Cell("x".join(map(str, shape))), count(weights)


def _own_grid(tensor: Tensor, found: ScannedTensor | None, granularity: str) -> Alignment | None:
    """How a tensor stood to the grid that it was guarded on."""
    grid = f"int8 {granularity}" if tensor.scheme == "int8" else tensor.scheme
    return next((a for a in (found.alignments if found else ()) if a.grid == grid), None)


def _expected(tensor: Tensor, found: ScannedTensor | None, granularity: str) -> float:
    """Mean distance to the nearest level, in gaps: what an unbiased draw moves on average."""
    alignment = _own_grid(tensor, found, granularity)
    if alignment is None:
        return 0.0
    bins = alignment.histogram
    return sum(part * (1 - (i + 0.5) / len(bins)) / 2 for i, part in enumerate(bins))


def _flipped(tensor: Tensor) -> float:
    return (tensor.flips or 0) / max(tensor.weights, 1)


def _drift_section(validation: Validation) -> Section:
    """How far outputs are from the original's."""
    runs = [
        ("plain", validation.plain_default),
        ("guarded", validation.guarded_default),
        ("float, moved", validation.moved),
    ]
    outputs = zip(validation.plain_default, validation.guarded_default, strict=True)
    return Section(
        "Drift of the outputs",
        f"Relative L2 distance from the original on {validation.feeds} inputs "
        f"({validation.inputs}), as onnxruntime runs the files by default. "
        "Pale: plain rounding. Dark: guarded.",
        bars([(p.output, p.relative_l2, g.relative_l2) for p, g in outputs]),
        ("output", "run", "relative L2", "cosine", "largest", "top-1"),
        tuple(
            (
                drift.output,
                run,
                f"{drift.relative_l2:.5f}",
                f"{drift.cosine:.6f}",
                f"{drift.max_abs:.3g}",
                "" if drift.top1 is None else percent(drift.top1),
            )
            for run, drifts in runs
            for drift in drifts
        ),
    )


def _budget_section(rows: Sequence[tuple[str, float, float, float]]) -> Section:
    """What is left to an attacker, before and after a guard."""
    return Section(
        "Alignment budget",
        "Sums over all judged weights, in their own units. Nearest: the rounding error that "
        "whoever set the weights can choose in full when they are rounded to nearest. After a "
        "guard: what he still chooses, and the standard deviation of the rest, which is drawn.",
        head=("grid", "nearest", "left to choose", "random"),
        rows=tuple((grid, *(f"{value:.4g}" for value in values)) for grid, *values in rows),
    )


def _outcome(report: GuardReport) -> tuple[str, str, str]:
    sentence = (
        f"{report.weights:,} weights in {len(report.tensors)} tensors at {report.scheme}, "
        f"{percent(report.coverage)} of all; {percent(report.flips / max(report.weights, 1))} of "
        "them moved across a boundary"
    )
    if not report.validation:
        return "warn", "not validated", sentence
    guarded, plain = (
        pooled(drifts)
        for drifts in (report.validation.guarded_exact, report.validation.plain_exact)
    )
    sampled = f" on {report.validation.layers} sampled layers" if report.validation.layers else ""
    return "good", "guarded", f"{sentence}. Drift{sampled} {guarded:.4f}, plain {plain:.4f}"


def _run_facts(report: GuardReport) -> tuple[tuple[str, str], ...]:
    form = report.granularity if report.block_size is None else f"blocks of {report.block_size}"
    settings = {"unbiased": f", tau {report.tau}", "topk": f", ratio {report.ratio}", "none": ""}
    note = f" ({report.preserve_note})" if report.preserve_note else ""
    facts = [
        ("scheme", f"{report.scheme}, {form}"),
        *((("at 8 bits", report.at_8_bits),) if report.at_8_bits else ()),
        ("policy", report.policy + settings[report.policy]),
        ("error feedback", report.preserve + note),
        *((("integers", report.integers.setting),) if report.integers else ()),
        *((("seed", str(report.seed)),) if report.seed is not None else ()),
        *((f"written, {megabytes(size)}", path) for path, size in report.outputs.items()),
    ]
    return tuple(facts)


def _verdict(verdict: Verdict) -> tuple[str, str, str]:
    return TONES.get(verdict.level, "plain"), verdict.level, verdict.reason


def _strongest(alignments: Sequence[Alignment]) -> Alignment:
    return max(alignments, key=lambda alignment: alignment.strength)


def _footer(result: Scan | GuardReport) -> str:
    config = f", options from {result.config}" if result.config else ""
    return f"flipguard-onnx {result.version}, {result.seconds:.1f} s{config}"


def _file_facts(sha256: str, data_sha256: dict[str, str], size: int) -> tuple[tuple[str, str], ...]:
    data = tuple((f"sha256 of {name}", digest) for name, digest in data_sha256.items())
    return (("sha256", sha256), *data, ("size", megabytes(size)))
