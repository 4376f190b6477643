"""Results as text for a terminal."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..errors import printable
from .batch import BatchReport, ModelOutcome
from .guard import ActivationQuantization, GuardReport, Inspection, Tensor, coverage
from .scan import NOT_JUDGED, Alignment, Scan, ScannedTensor, Skipped, SkipReason, Verdict
from .validation import Drift, Validation, Verification, pooled


def _row(outcome: ModelOutcome) -> tuple[str, ...]:
    """Cells of the summary; the last one has the outputs, or the error."""
    coverage, flipped, guarded, plain = "", "", "", ""
    last = (outcome.error or "").removeprefix(f"{outcome.model}: ")
    if report := outcome.report:
        coverage = f"{report.coverage:.2%}"
        flipped = f"{report.flips / max(report.weights, 1):.2%}"
        last = ", ".join(report.outputs)
        if report.validation:
            guarded = f"{pooled(report.validation.guarded_exact):.5f}"
            plain = f"{pooled(report.validation.plain_exact):.5f}"
    seconds = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    figures = str(outcome.code), coverage, flipped, guarded, plain, seconds
    return printable(outcome.model), *figures, printable(last)


SLOW_4_BIT = (
    "large 4-bit matrices stay packed: that saves memory, and takes longer than float32 "
    "(where few rows are multiplied at once several times as long)"
)
SLOW_16_BIT = "onnxruntime's CPU kernels know no 16-bit activations: there it runs in float, slower"


def _by_operator(tensors: Sequence[Tensor]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.op, tensor.scheme].append(tensor)
    rows: list[tuple[str, ...]] = []
    for (op, scheme), members in groups.items():
        weights = sum(t.weights for t in members)
        flips = sum(t.flips or 0 for t in members)
        rows.append((op, scheme, str(len(members)), f"{weights:,}", f"{flips / weights:.2%}"))
    return rows


def _coverage_line(tensors: Sequence[Tensor], skipped: Sequence[Skipped]) -> str:
    weights = sum(tensor.weights for tensor in tensors)
    return (
        f"guarded   {weights:,} weights in {len(tensors)} tensors, "
        f"{coverage(tensors, skipped):.2%} of all"
    )


def _validation_lines(validation: Validation) -> list[str]:
    exact = validation.plain_exact, validation.guarded_exact
    default = validation.plain_default, validation.guarded_default
    runs = {"plain": exact[0], "guarded": exact[1]}
    if exact != default:
        runs |= {"plain, fused": default[0], "guarded, fused": default[1]}
    drifts = zip(*runs.values(), strict=True)
    rows = [
        (drift.output, run, *_drift_cells(drift))
        for output in drifts
        for run, drift in zip(runs, output, strict=True)
    ]
    rows += [(drift.output, "float, moved", *_drift_cells(drift)) for drift in validation.moved]
    head = ("output", "run", "relative L2", "cosine", "max abs", "SQNR dB", "top-1")
    return [
        "",
        *table(head, rows),
        "",
        *(
            [f"sampled   {validation.layers} layers: the model is too large to be run whole"]
            if validation.layers
            else []
        ),
        f"valid     on {validation.feeds} inputs ({validation.inputs}): drift of all outputs "
        f"{pooled(validation.guarded_exact):.5f}, plain quantization's "
        f"{pooled(validation.plain_exact):.5f}",
    ]


def _drift_cells(drift: Drift) -> tuple[str, ...]:
    return (
        f"{drift.relative_l2:.5f}",
        f"{drift.cosine:.6f}",
        f"{drift.max_abs:.3g}",
        f"{drift.sqnr_db:.1f}",
        "" if drift.top1 is None else f"{drift.top1:.1%}",
    )


def verdict_lines(verdict: Verdict) -> list[str]:
    grids = f", {' and '.join(verdict.grids)}" if verdict.grids else ""
    return [f"scan      {verdict.level}{grids}", f"          {verdict.reason}"]


def _strongest(tensor: ScannedTensor) -> Alignment:
    return next(a for a in tensor.alignments if a.grid == tensor.verdict.grids[0])


def _figures(alignment: Alignment) -> Sequence[str]:
    return (
        f"{alignment.weights:,}",
        f"{alignment.near:.2%}",
        f"{alignment.near_placebo:.2%}",
        f"{alignment.peak:.2%}",
        f"{alignment.peak_at:.2f}",
        f"{alignment.edge:.2%}",
        f"{alignment.collapse:.1%}",
        f"x{alignment.outlier:.2f}",
    )


def _budget_lines(alignments: Sequence[Alignment]) -> list[str]:
    rows = [
        (a.grid, f"{a.budget.nearest:.6g}", f"{a.budget.chosen:.4g}", f"{a.budget.random:.4g}")
        for a in alignments
    ]
    head = ("alignment budget", "rounded to nearest", "guarded: chosen", "random")
    return table(head, rows, left=1)


CELL = 120  # characters of a name in a table


def text(lines: Iterable[str]) -> str:
    """Lines for a terminal, whatever the names in them are."""
    return "\n".join(printable(line) for line in lines).rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Left-aligned text in the first `left` columns, right-aligned figures after them."""
    rows = [[printable(cell, CELL) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def config_line(config: str | None) -> list[str]:
    """Which file gave options, if one did."""
    return [f"config    {config}"] if config else []


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def skipped_lines(skipped: Sequence[Skipped], names: bool = False) -> list[str]:
    """A line per reason; with `names`, a line per tensor below it, 1-D ones and scalars aside."""
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for tensor in skipped:
        reasons[tensor.text].append(tensor)
    lines = []
    for reason, members in sorted(reasons.items(), key=lambda item: -len(item[1])):
        size = sum(t.size for t in members)
        lines.append(f"skipped   {len(members)} tensors, {size:,} values: {reason}")
        if names and not members[0].is_vector:
            lines += [f"          {t.name}  {'x'.join(map(str, t.shape))}" for t in members]
    return lines


def _activation_lines(integers: ActivationQuantization, weights: Mapping[str, int]) -> list[str]:
    """For a text report; weights: how many each guarded tensor has."""
    inside = [name for name in weights if name not in integers.weight_only]
    share = sum(weights[name] for name in inside) / max(sum(weights.values()), 1)
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in integers.weight_only.items():
        reasons[reason].append(name)
    kept = "other constants: nobody guards them, so they stay float"
    return [
        f"integers  {integers.setting}: {len(inside)} of {len(weights)} tensors, {share:.1%} of "
        "the weights",
        *(
            f"          not {len(names)}, {sum(weights[n] for n in names):,} weights: {reason}"
            for reason, names in reasons.items()
        ),
        *([f"          not {len(integers.floats)} {kept}"] if integers.floats else []),
        *([f"speed     {SLOW_16_BIT}"] if integers.activations == "int16" else []),
    ]


def render_inspection(inspection: Inspection) -> str:
    lines = [
        *config_line(inspection.config),
        f"{inspection.input}  {megabytes(inspection.input_bytes)}, "
        f"sha256 {inspection.input_sha256[:16]}",
        f"scheme    {inspection.scheme}: about {megabytes(inspection.output_bytes)} when written",
        "",
        *table(
            ("tensor", "operator", "shape", "scheme", "weights"),
            [
                (t.name, t.op, "x".join(map(str, t.shape)), t.scheme, f"{t.weights:,}")
                for t in inspection.tensors
            ],
        ),
        "",
        *skipped_lines(inspection.skipped, names=True),
        _coverage_line(inspection.tensors, inspection.skipped),
    ]
    return text(lines)


def render_guard(report: GuardReport) -> str:
    settings = {
        "unbiased": f"unbiased, tau {report.tau}",
        "topk": f"topk, ratio {report.ratio}",
        "none": "none (round to nearest)",
    }
    form = report.granularity if report.block_size is None else f"blocks of {report.block_size}"
    share = report.flips / max(report.weights, 1)
    lines = [
        *config_line(report.config),
        f"input     {report.input}  {megabytes(report.input_bytes)}, "
        f"sha256 {report.input_sha256[:16]}",
        f"scheme    {report.scheme}, {form}",
        f"policy    {settings[report.policy]}"
        + ("" if report.seed is None else f", seed {report.seed}"),
        *([f"device    {report.device}: {report.device_note}"] if report.device_note else []),
        *([f"int8      {report.at_8_bits}"] if report.at_8_bits else []),
        *_preserve_lines(report),
        *_integer_lines(report),
        *_speed_lines(report),
        "",
        *table(
            ("operator", "scheme", "tensors", "weights", "flipped"), _by_operator(report.tensors)
        ),
        "",
        *skipped_lines(report.skipped),
        _coverage_line(report.tensors, report.skipped) + f", {share:.2%} of them flipped",
        *_scan_lines(report),
        *(_validation_lines(report.validation) if report.validation else ["", "not validated"]),
        "",
        *(
            f"written   {path}  {megabytes(size)} ({size / report.input_bytes:.0%} of the input)"
            for path, size in report.outputs.items()
        ),
    ]
    return text(lines)


def _scan_lines(report: GuardReport) -> list[str]:
    if not report.scan or not report.budget:
        return []
    left = report.budget
    return [
        "",
        *verdict_lines(report.scan.verdict),
        f"budget    of alignment: {left.nearest:.4g} when rounded to nearest; guarded, "
        f"{left.chosen:.4g} left to choose and {left.random:.4g} at random",
    ]


def _speed_lines(report: GuardReport) -> list[str]:
    packed = any(tensor.packed for tensor in report.tensors)
    return [f"speed     {SLOW_4_BIT}"] if packed else []


def _integer_lines(report: GuardReport) -> list[str]:
    sizes = {tensor.name: tensor.weights for tensor in report.tensors}
    return _activation_lines(report.integers, sizes) if report.integers else []


def _preserve_lines(report: GuardReport) -> list[str]:
    if report.preserve == "off":
        return [f"preserve  off: {report.preserve_note}"] if report.preserve_note else []
    kept = [tensor for tensor in report.tensors if tensor.preserved]
    share = sum(tensor.weights for tensor in kept) / max(report.weights, 1)
    gains = sorted(tensor.gain or 0 for tensor in kept)
    typical = f", layer error x{gains[len(gains) // 2]:.2f} (median)" if gains else ""
    furthest = max((tensor.furthest or 0 for tensor in kept), default=0)
    typical += f", codes up to {furthest} levels from plain's" if furthest > 1 else ""
    reasons: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in report.tensors:
        if not tensor.preserved:
            reasons[tensor.unfed or "no better on fresh inputs"].append(tensor)
    return [
        f"preserve  on {report.preserve} inputs: {len(kept)} of {len(report.tensors)} tensors, "
        f"{share:.1%} of the weights{typical}",
        *(
            f"          not {len(members)}, {sum(t.weights for t in members):,} weights: {why}"
            for why, members in reasons.items()
        ),
    ]


def render_scan(scan: Scan) -> str:
    head = ("grid", "weights", "near", "placebo", "peak", "at", "edge", "collapse", "outlier")
    lines = [
        *config_line(scan.config),
        f"input     {scan.input}  {megabytes(scan.input_bytes)}, sha256 {scan.input_sha256[:16]}",
        *verdict_lines(scan.verdict),
        "",
    ]
    if scan.alignments:
        lines += [
            *table(head, [(a.grid, *_figures(a)) for a in scan.alignments], left=1),
            "",
            *_budget_lines(scan.alignments),
            "",
        ]
    if alarming := [tensor for tensor in scan.tensors if tensor.verdict.alarming]:
        rows = [(t.name, t.verdict.grids[0], *_figures(_strongest(t))) for t in alarming]
        lines += [*table(("tensor", *head), rows), ""]
    reasons = [
        Skipped(t.name, t.shape, SkipReason.NOT_JUDGED, t.verdict.reason)
        for t in scan.tensors
        if t.verdict.level == NOT_JUDGED
    ]
    lines += skipped_lines([*reasons, *scan.skipped])
    return text(lines)


def render_verification(verification: Verification) -> str:
    origin = {
        True: "recorded as made from this original",
        False: "recorded as made from ANOTHER original",
        None: "no record of what it was made from",
    }
    lines = [
        *config_line(verification.config),
        f"original  {verification.original}",
        f"guarded   {verification.guarded}: {origin[verification.made_from]}",
        f"measure   plain {verification.scheme} quantization of the original",
        *_validation_lines(verification.validation),
    ]
    return text(lines)


def render_batch(fleet: BatchReport) -> str:
    head = ("model", "exit", "coverage", "flipped", "drift", "plain", "seconds", "output")
    rows = [head, *map(_row, fleet.outcomes)]
    width = max(len(row[0]) for row in rows)
    lines = [
        "{:{}}  {:>4}  {:>8}  {:>7}  {:>7}  {:>7}  {:>7}  {}".format(row[0], width, *row[1:])
        for row in rows
    ]
    bad = sum(outcome.code != 0 for outcome in fleet.outcomes)
    lines = [*map(printable, config_line(fleet.config)), *lines]
    return "\n".join([*lines, "", f"guarded   {len(fleet.outcomes) - bad} models, {bad} failed"])
