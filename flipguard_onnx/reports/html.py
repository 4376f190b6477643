"""The result of a scan or a guard as one HTML file."""

from collections.abc import Iterable, Sequence

from .guard import GuardReport, Tensor
from .scan import Alignment, Budget, Scan, ScannedTensor, Verdict
from .svg import (
    Cell,
    Layer,
    Page,
    Section,
    bars,
    count,
    figure,
    heat_section,
    share,
    skipped_section,
)
from .validation import Validation, joined, pooled
from .words import (
    SCAN_TERMS,
    fallbacks,
    megabytes,
    percent,
    policy_in_words,
    scheme_in_words,
)

TONES = {
    "clean": "good",
    "suspicious": "warn",
    "clips": "bad",
    "collapses": "bad",
    "aligned": "bad",
}

USUAL = ("int8 channel", "int8 tensor", "int4", "nf4", "fp4")  # grids that every layer shows

IDENTITY = {  # columns of the table of layers, and what they mean where that needs words
    "name": "",
    "operator": "",
    "shape": "",
    "weights": "",
}

SCANNED = {
    "verdict": "",
    "grid": "the one to which the layer is aligned most strongly; the next columns are about it",
    **{
        term: SCAN_TERMS[term]
        for term in ("near", "peak", "edge", "collapse", "outlier", "loss", "clipped")
    },
    "budget": "rounding errors that an attacker could choose on that grid, in % of the weights' "
    "total magnitude",
}

GUARDED = {
    "scheme": "",
    "flipped": "share of the weights that were moved to another level than the nearest",
    "expected": "the share that independent draws would move, from where the weights stood",
    "furthest": "largest distance of a code from the nearest one, in levels",
    "layer error": "squared error of the layer's outputs with error feedback, compared with "
    "independent draws; x1: feedback was no better and was not used; none: it was not tried",
    "budget": "rounding errors that an attacker could choose with rounding to nearest, in % of the "
    "weights' total magnitude",
    "left": "what the guard leaves of them to choose",
    "random": "standard deviation of the error that the guard drew and nobody chose, in the same %",
    "scan": "verdict on the layer before the guard",
    "strength": "share of the weights whose position only a quantizer's boundaries explain",
}

DRIFT = {
    "run": "nearest: every weight rounded to nearest; guarded: the file written; moved float: the "
    "float model with moved weights",
    "relative L2": "length of the difference from the original's output / length of that output",
    "max error": "largest difference of a value",
    "same top-1": "how often the largest value of the last axis is at the same place",
    "KL, nats": "divergence of the softmax from the original's, over a vocabulary: by this much "
    "the log perplexity grows",
}


def scan_html(scan: Scan) -> str:
    """The page of a scan."""
    sections = []
    if scan.alignments:
        sections.append(_grids_section(scan.alignments))
    judged = [tensor for tensor in scan.tensors if tensor.alignments]
    if judged and scan.alignments:
        grids = [a.grid for a in scan.alignments]
        shown = (*scan.verdict.grids, _strongest(scan.alignments).grid)[0]
        index = grids.index(shown)
        rows = [(t.name, t.alignments[index].histogram) for t in judged]
        sections.append(heat_section(f"on {shown}", rows))
    if scan.alignments:
        sections.append(_budget_section((a.grid, a.budget) for a in scan.alignments))
    alarming = [tensor for tensor in scan.constants if tensor.verdict.alarming]
    page = Page(
        scan.input,
        "Was this model prepared for a quantizer?",
        (_verdict(scan.verdict),),
        _file_facts(scan.input_sha256, scan.input_data_sha256, scan.input_bytes),
        tuple(sections),
        IDENTITY | SCANNED,
        tuple(map(_scanned, (*scan.tensors, *alarming))),
        skipped_section(scan.skipped),
        _footer(scan),
    )
    return page.render()


def guard_html(report: GuardReport) -> str:
    """The page of a guard."""
    scanned = {tensor.name: tensor for tensor in report.scan.tensors} if report.scan else {}
    pairs = [(tensor, scanned.get(tensor.name)) for tensor in report.tensors]
    histograms = [
        (tensor.name, alignment.histogram)
        for tensor, found in pairs
        if (alignment := _on_its_grid(tensor, found))
    ]
    flips = [(tensor.name, _expected(tensor, found), _flipped(tensor)) for tensor, found in pairs]
    sections = []
    if histograms:
        sections.append(
            heat_section("before the guard, each on the grid of its scheme", histograms)
        )
    sections.append(
        Section(
            "Flipped weights, layer by layer",
            "Share of the weights that were moved to another level than the nearest, beside the "
            "share expected of independent draws (25% where the weights are spread evenly). Error "
            "feedback moves more.",
            bars(flips, ("expected", "flipped"), percent),
        )
    )
    if report.validation:
        sections.append(_drift_section(report.validation))
    if report.budget:
        sections.append(_budget_section([(report.scheme, report.budget)]))
    page = Page(
        report.input,
        "Guarded against quantization-conditioned backdoors",
        (_outcome(report), *((_verdict(report.scan.verdict, "input "),) if report.scan else ())),
        (
            *_file_facts(report.input_sha256, report.input_data_sha256, report.input_bytes),
            *_run_facts(report),
        ),
        tuple(sections),
        IDENTITY | GUARDED,
        tuple(_guarded(tensor, found) for tensor, found in pairs),
        skipped_section(report.skipped),
        _footer(report),
    )
    return page.render()


# layers


def _scanned(tensor: ScannedTensor) -> Layer:
    cells = [*_identity(tensor.name, tensor.op, tensor.shape, tensor.weights)]
    cells.append(Cell(tensor.verdict.level))
    if tensor.alignments:
        at = _strongest(tensor.alignments)
        cells.append(Cell(at.grid))
        cells += [share(value) for value in (at.near, at.peak, at.edge, at.collapse)]
        cells += [figure(at.outlier, "x"), figure(at.loss), share(at.clipped)]
        cells.append(share(at.budget.shares[0]))
    else:
        cells += [Cell("")] * 9
    return Layer(tuple(cells), _histograms(tensor.alignments, *tensor.verdict.grids))


def _guarded(tensor: Tensor, found: ScannedTensor | None) -> Layer:
    cells = [*_identity(tensor.name, tensor.op, tensor.shape, tensor.weights), Cell(tensor.scheme)]
    cells += [share(_flipped(tensor)), share(_expected(tensor, found))]
    cells.append(count(tensor.furthest or 0))
    cells.append(Cell("none") if tensor.gain is None else figure(min(tensor.gain, 1.0), "x"))
    cells += map(share, tensor.budget.shares) if tensor.budget else [Cell("")] * 3
    cells += [Cell(found.verdict.level), share(found.verdict.strength)] if found else [Cell("")] * 2
    shown = _histograms(found.alignments, tensor.grid, *found.verdict.grids) if found else ()
    return Layer(tuple(cells), shown)


def _histograms(
    alignments: Iterable[Alignment], *grids: str
) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Those of the usual grids and of these; all of a large model would make a large page."""
    return tuple((a.grid, a.histogram) for a in alignments if a.grid in (*USUAL, *grids))


def _identity(name: str, op: str, shape: Sequence[int], weights: int) -> tuple[Cell, ...]:
    return Cell(name), Cell(op), Cell("x".join(map(str, shape))), count(weights)


def _on_its_grid(tensor: Tensor, found: ScannedTensor | None) -> Alignment | None:
    """How a tensor stood to the grid that it was guarded on."""
    return next((a for a in (found.alignments if found else ()) if a.grid == tensor.grid), None)


def _expected(tensor: Tensor, found: ScannedTensor | None) -> float:
    """Mean distance to the nearest level, in gaps: the share that unbiased draws move."""
    alignment = _on_its_grid(tensor, found)
    if alignment is None:
        return 0.0
    bins = alignment.histogram
    return sum(part * (1 - (i + 0.5) / len(bins)) / 2 for i, part in enumerate(bins))


def _flipped(tensor: Tensor) -> float:
    return (tensor.flips or 0) / max(tensor.weights, 1)


def _strongest(alignments: Sequence[Alignment]) -> Alignment:
    return max(alignments, key=lambda alignment: alignment.strength)


# sections


def _grids_section(alignments: Sequence[Alignment]) -> Section:
    return Section(
        "Where the weights stand, grid by grid",
        "All judged tensors together. Ordinary training spreads the weights evenly between the "
        "boundaries at which rounding to nearest switches from one level to the next; an attack "
        "gathers them.",
        head=("grid", "weights", *SCAN_TERMS),
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
                f"x{a.outlier:.2f}",
                f"{a.loss:.2f}",
                percent(a.clipped),
            )
            for a in alignments
        ),
        terms=SCAN_TERMS,
    )


def _drift_section(validation: Validation) -> Section:
    """How far outputs are from the original's."""
    nearest, guarded = joined(validation.plain_default), joined(validation.guarded_default)
    runs = {"nearest": nearest, "guarded": guarded}
    runs |= {"moved float": joined(validation.moved)} if validation.moved else {}
    outputs = zip(nearest, guarded, strict=True)
    return Section(
        "Drift of the outputs",
        f"How far the outputs are from the original's on {validation.feeds} inputs "
        f"({validation.inputs}), as onnxruntime runs the files by default. Bars: relative L2.",
        bars(
            [(p.output, p.relative_l2, g.relative_l2) for p, g in outputs],
            ("rounded to nearest", "guarded"),
        ),
        ("output", "run", "relative L2", "cosine", "max error", "same top-1", "KL, nats"),
        tuple(
            (
                drift.output,
                run,
                f"{drift.relative_l2:.5f}",
                f"{drift.cosine:.6f}",
                f"{drift.max_abs:.3g}",
                "" if drift.top1 is None else percent(drift.top1),
                "" if drift.kl is None else f"{drift.kl:.4f}",
            )
            for output in zip(*runs.values(), strict=True)
            for run, drift in zip(runs, output, strict=True)
        ),
        terms=DRIFT,
    )


def _budget_section(budgets: Iterable[tuple[str, Budget]]) -> Section:
    """What is left to an attacker, before and after a guard."""
    return Section(
        "Alignment budget",
        "How much rounding error an attacker could choose by setting the weights, in % of the "
        "weights' total magnitude: all of it when they are rounded to nearest; after a guard, only "
        "what the draws leave. The random error (a standard deviation) is drawn by the guard, and "
        "nobody chooses it. Counted for independent draws, without error feedback.",
        head=("grid", "rounded to nearest", "after the guard", "random error"),
        rows=tuple((grid, *map(percent, budget.shares)) for grid, budget in budgets),
    )


# head and foot


def _verdict(verdict: Verdict, about: str = "") -> tuple[str, str, str]:
    return TONES.get(verdict.level, "plain"), about + verdict.title, verdict.reason


def _outcome(report: GuardReport) -> tuple[str, str, str]:
    schemes = dict.fromkeys(tensor.scheme for tensor in report.tensors)
    sentence = (
        f"{report.weights:,} weights in {len(report.tensors)} tensors at {' and '.join(schemes)}, "
        f"{percent(report.coverage)} of all; {percent(report.flips / max(report.weights, 1))} of "
        "them moved across a boundary."
    )
    validation = report.validation
    if not validation:
        return "warn", "not validated", sentence
    sampled = f" of {validation.layers} sampled layers" if validation.layers else ""
    return (
        "good",
        "guarded",
        f"{sentence} The outputs{sampled} drift from the original's by "
        f"{pooled(validation.guarded_exact):.4f} (relative L2); rounding to nearest: "
        f"{pooled(validation.plain_exact):.4f}; allowed: up to {validation.allowed:.4f}.",
    )


def _run_facts(report: GuardReport) -> tuple[tuple[str, str], ...]:
    note = f" ({report.preserve_note})" if report.preserve_note else ""
    kept = "off" if report.preserve == "off" else f"on {report.preserve} inputs"
    facts = [
        ("scheme", scheme_in_words(report)),
        *(("fallback", f"{who}: {what}") for who, what in fallbacks(report)),
        *((("at 8 bits", report.at_8_bits),) if report.at_8_bits else ()),
        ("policy", policy_in_words(report)),
        ("error feedback", kept + note),
        *((("activations", report.integers.setting),) if report.integers else ()),
        *((("seed", str(report.seed)),) if report.seed is not None else ()),
        *((f"written, {megabytes(size)}", path) for path, size in report.outputs.items()),
    ]
    return tuple(facts)


def _file_facts(sha256: str, data_sha256: dict[str, str], size: int) -> tuple[tuple[str, str], ...]:
    data = tuple((f"sha256 of {name}", digest) for name, digest in data_sha256.items())
    return (("sha256", sha256), *data, ("size", megabytes(size)))


def _footer(result: Scan | GuardReport) -> str:
    config = f", options from {result.config}" if result.config else ""
    return f"flipguard-onnx {result.version}, {result.seconds:.1f} s{config}"
