"""Results as text for a terminal: a section per kind of result, and the pieces they share."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..errors import printable
from ..formats import FLOAT4, FORMATS
from .batch import BatchReport, ModelOutcome
from .guard import (
    ActivationQuantization,
    GuardReport,
    Inspection,
    TargetInspection,
    Tensor,
    coverage,
)
from .scan import NOT_JUDGED, Alignment, Budget, Scan, ScannedTensor, Skipped, SkipReason, Verdict
from .validation import (
    MAX_KL,
    MAX_RELATIVE_L2,
    Drift,
    Validation,
    Verification,
    joined,
    pooled,
)
from .words import (
    SCAN_TERMS,
    fallbacks,
    fingerprint,
    megabytes,
    percent,
    plural,
    policy_in_words,
    scheme_in_words,
)

CELL = 120  # characters of a name in a table

NAMED = 3  # of many tensors or models

LOW_COVERAGE = 0.9  # share of all float values below which a report warns

INDENT = " " * 10  # of lines that go on with the one above them

PACKED: dict[str, tuple[str, ...]] = {  # by form
    "nbits": (
        "matrices stay packed in memory, and what they are multiplied with is rounded to 8 bits:",
        "faster than float32 where few rows are multiplied at once",
    ),
    "bnb4": (
        "4-bit matrices stay packed: that saves memory, but takes longer than float32",
        "(several times as long where few rows are multiplied at once; not so at int4)",
    ),
}

DECODED_AGAIN = (
    "in onnxruntime, these weights are decoded again at every inference; not so with the session",
    "option session.disable_quant_qdq=1, nor in a model written with --target onnxruntime",
)

FUSED_OR_DECODED = (
    "in onnxruntime, MatMul and Gemm may round what these weights are multiplied with to 8 bits;",
    "otherwise the weights are decoded again at every inference. Not so with the session option",
    "session.disable_quant_qdq=1, nor in a model written with --target onnxruntime",
)

NO_KERNEL = (
    "onnxruntime has no kernel for the 4-bit floats in this file; --target onnxruntime writes a",
    "form that it runs",
)

NOTHING_QUANTIZED = "nothing in the guarded model is quantized: it holds no integer weights"

SLOW_16_BIT = "onnxruntime runs 16-bit activations in float on the CPU, which is slower"

# options of guard() that no other line of the report shows
NOT_SHOWN_ELSEWHERE = (
    "include",
    "exclude",
    "allow_unguarded",
    "target",
    "max_memory",
)


# inspect()


def render_inspection(inspection: Inspection) -> str:
    """The result of inspect()."""
    lines = [
        *config_line(inspection.config),
        f"{inspection.input}  {megabytes(inspection.input_bytes)}, "
        f"{fingerprint(inspection.input_sha256, inspection.input_data_sha256)}",
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
        *_shared_lines(inspection.tensors),
        *skipped_lines(inspection.skipped, names=True),
        *_unguarded_lines(inspection.skipped),
        _coverage_line(inspection.tensors, inspection.skipped),
        *_coverage_warning(inspection.tensors, inspection.skipped),
    ]
    return text(lines)


def render_target_inspection(inspection: TargetInspection) -> str:
    """The result of inspect --target."""
    quantized = plural(inspection.tensors, "quantized tensor")
    if not inspection.tensors:
        verdict = "nothing is quantized in this file"
    elif inspection.findings:
        verdict = f"{quantized}; these do not meet what it asks for (docs/runtimes.md):"
    else:
        verdict = f"{quantized}; as far as the file shows it, all meet what it asks for"
    lines = [
        *config_line(inspection.config),
        f"input     {inspection.input}  "
        f"{fingerprint(inspection.input_sha256, inspection.input_data_sha256)}",
        f"target    {inspection.target}: {verdict}",
    ]
    for finding in inspection.findings:
        named = _some([printable(name, CELL) for name in finding.tensors])
        lines.append(f"{INDENT}{finding.requirement}: not {named}")
    return text(lines)


# guard()


def render_guard(report: GuardReport) -> str:
    """The result of guard()."""
    share = report.flips / max(report.weights, 1)
    lines = [
        *config_line(report.config),
        f"input     {report.input}  {megabytes(report.input_bytes)}, "
        f"{fingerprint(report.input_sha256, report.input_data_sha256)}",
        f"scheme    {scheme_in_words(report)}",
        f"policy    {policy_in_words(report)}"
        + ("" if report.seed is None else f", seed {report.seed}"),
        *_option_lines(report),
        *([f"device    {report.device}: {report.device_note}"] if report.device_note else []),
        *([f"int8      {report.at_8_bits}"] if report.at_8_bits else []),
        *_fallback_lines(report),
        *_feedback_lines(report),
        *(_activation_lines(report.integers, report.tensors) if report.integers else []),
        *_speed_lines(report),
        "",
        *table(
            ("operator", "scheme", "tensors", "weights", "flipped"), _by_operator(report.tensors)
        ),
        "",
        *_shared_lines(report.tensors),
        *skipped_lines(report.skipped),
        *_quantizer_lines(report),
        *_unguarded_lines(report.skipped),
        _coverage_line(report.tensors, report.skipped)
        + f"; {share:.2%} of them flipped (moved to another level than the nearest)",
        *_coverage_warning(report.tensors, report.skipped),
        *_scan_lines(report),
        *(_validation_lines(report.validation) if report.validation else ["", "not validated"]),
        "",
        *(
            f"written   {path}  {megabytes(size)} ({size / report.input_bytes:.0%} of the input)"
            for path, size in report.outputs.items()
        ),
    ]
    return text(lines)


def _speed_lines(report: GuardReport) -> list[str]:
    """What is to be known of the time that the written model takes in onnxruntime."""
    if report.options.get("target") == "onnxruntime":
        forms = {form for tensor in report.tensors for form in tensor.forms}
        known = [PACKED[form] for form in PACKED if form in forms]
    else:
        decoded = [tensor for tensor in report.tensors if "dequantize" in tensor.forms]
        if any(tensor.scheme in FLOAT4 for tensor in decoded):
            stand_in = " (this one was validated with their values as float32)"
            return [
                f"runs      {NO_KERNEL[0]}",
                f"{INDENT}{NO_KERNEL[1]}{stand_in if report.validation else ''}",
            ]
        ops = {tensor.op for tensor in decoded if tensor.scheme != "fp8"}  # which it never fuses
        fused = bool(ops & {"MatMul", "Gemm"})
        known = [FUSED_OR_DECODED if fused else DECODED_AGAIN] if decoded else []
    lines = []
    for first, *others in known:
        lines += [f"speed     {first}", *(f"{INDENT}{line}" for line in others)]
    return lines


def _option_lines(report: GuardReport) -> list[str]:
    """The options that differ from their defaults and that no other line shows."""
    shown = []
    for name in NOT_SHOWN_ELSEWHERE:
        if name in report.changed_options:
            value, flag = report.options[name], f"--{name.replace('_', '-')}"
            if isinstance(value, list):
                shown += [f"{flag} {pattern}" for pattern in value]
            else:
                shown.append(flag if value is True else f"{flag} {value}")
    return [f"options   {' '.join(shown)}"] if shown else []


def _fallback_lines(report: GuardReport) -> list[str]:
    return [f"fallback  {printable(who, CELL)}: {what}" for who, what in fallbacks(report)]


def _feedback_lines(report: GuardReport) -> list[str]:
    if report.preserve == "off":
        lines = [f"preserve  off: {report.preserve_note}"] if report.preserve_note else []
        errors = sorted(
            tensor.weight_error or 0 for tensor in report.tensors if FORMATS[tensor.scheme].bits < 8
        )
        if lines and errors:
            lines.append(
                f"{INDENT}at {FORMATS[report.scheme].bits} bits that costs accuracy: weights are "
                f"off by {errors[len(errors) // 2]:.1%} (relative L2, median of the tensors), and "
                "no other weights make up for it"
            )
        return lines
    fed = [tensor for tensor in report.tensors if tensor.preserved]
    share = sum(tensor.weights for tensor in fed) / max(report.weights, 1)
    beside = f" ({report.preserve_note})" if report.preserve_note else ""
    lines = [
        f"preserve  on {report.preserve} inputs{beside}: {len(fed)} of "
        f"{plural(len(report.tensors), 'tensor')}, {share:.1%} of the weights"
    ]
    if fed:
        gains = sorted(tensor.gain or 0 for tensor in fed)
        lines.append(
            f"{INDENT}squared error of their layers' outputs: x{gains[len(gains) // 2]:.2f} "
            "(median) compared with independent draws"
        )
    furthest = max((tensor.furthest or 0 for tensor in fed), default=0)
    if furthest > 1:
        lines.append(f"{INDENT}codes are up to {furthest} levels away from the nearest")
    reasons: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in report.tensors:
        if not tensor.preserved:
            reasons[tensor.unfed or "no better on fresh inputs"].append(tensor)
    return lines + [
        f"{INDENT}not in {_tensors_and_weights([t.weights for t in members])}: {why}"
        for why, members in reasons.items()
    ]


def _activation_lines(integers: ActivationQuantization, tensors: Sequence[Tensor]) -> list[str]:
    weights = {tensor.name: tensor.weights for tensor in tensors}
    inside = [name for name in weights if name not in integers.weight_only]
    share = sum(weights[name] for name in inside) / max(sum(weights.values()), 1)
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in integers.weight_only.items():
        reasons[reason].append(name)
    constants = plural(len(integers.floats), "other constant")
    return [
        f"integers  {integers.setting}: {len(inside)} of {plural(len(weights), 'tensor')}, "
        f"{share:.1%} of the weights",
        *(
            f"{INDENT}weight-only: {_tensors_and_weights([weights[n] for n in names])}: {reason}"
            for reason, names in reasons.items()
        ),
        *([f"{INDENT}float: {constants}, which the guard does not cover"] * bool(integers.floats)),
        *([f"speed     {SLOW_16_BIT}"] if integers.activations == "int16" else []),
    ]


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


def _scan_lines(report: GuardReport) -> list[str]:
    if not report.scan or not report.budget:
        return []
    nearest, chosen, random = map(percent, report.budget.shares)
    return [
        "",
        *verdict_lines(report.scan.verdict),
        "budget    rounded to nearest, an attacker could choose rounding errors worth "
        f"{nearest} of the weights' total magnitude;",
        f"{INDENT}after the guard {chosen}, beside {random} of random error that nobody chooses",
    ]


# scan()


def render_scan(scan: Scan) -> str:
    """The result of scan()."""
    head = ("grid", "weights", *SCAN_TERMS)
    lines = [
        *config_line(scan.config),
        f"input     {scan.input}  {megabytes(scan.input_bytes)}, "
        f"{fingerprint(scan.input_sha256, scan.input_data_sha256)}",
        *verdict_lines(scan.verdict),
        "",
    ]
    if scan.alignments:
        lines += [
            *table(head, [(a.grid, *_alignment_cells(a)) for a in scan.alignments], left=1),
            "",
            *(f"{term:8}  {meaning}" for term, meaning in SCAN_TERMS.items()),
            "",
            *_budget_lines({a.grid: a.budget for a in scan.alignments}),
            "",
        ]
    looked_at = (*scan.tensors, *scan.constants)
    if alarming := [tensor for tensor in looked_at if tensor.verdict.alarming]:
        rows = [(t.name, t.verdict.grids[0], *_alignment_cells(_named(t))) for t in alarming]
        lines += [*table(("tensor", *head), rows), ""]
    reasons = [
        Skipped(t.name, t.shape, SkipReason.NOT_JUDGED, t.verdict.reason)
        for t in scan.tensors
        if t.verdict.level == NOT_JUDGED
    ]
    lines += skipped_lines([*reasons, *scan.skipped])
    return text(lines)


def _named(tensor: ScannedTensor) -> Alignment:
    """How the tensor stands to the grid that its verdict names first."""
    return next(a for a in tensor.alignments if a.grid == tensor.verdict.grids[0])


def _alignment_cells(alignment: Alignment) -> tuple[str, ...]:
    return (
        f"{alignment.weights:,}",
        f"{alignment.near:.2%}",
        f"{alignment.near_placebo:.2%}",
        f"{alignment.peak:.2%}",
        f"{alignment.peak_at:.2f}",
        f"{alignment.edge:.2%}",
        f"{alignment.collapse:.1%}",
        f"x{alignment.outlier:.2f}",
        f"{alignment.loss:.2f}",
        f"{alignment.clipped:.1%}",
    )


def _budget_lines(budgets: Mapping[str, Budget]) -> list[str]:
    head = ("grid", "rounded to nearest", "after a guard", "random error")
    rows = [(grid, *map(percent, budget.shares)) for grid, budget in budgets.items()]
    return [
        "Rounding errors that an attacker could choose, and those that a guard would draw at "
        "random, in % of the weights' total magnitude:",
        *table(head, rows, left=1),
    ]


# verify()


def render_verification(verification: Verification) -> str:
    """The result of verify()."""
    origin = {
        True: "recorded as made from this original",
        False: "recorded as made from ANOTHER original",
        None: "no record of what it was made from",
    }
    lines = [
        *config_line(verification.config),
        f"original  {verification.original}",
        f"guarded   {verification.guarded}: {origin[verification.made_from]}",
        *([f"warning   {NOTHING_QUANTIZED}"] * (not verification.codes)),
        f"compared  with the original rounded to nearest at {verification.scheme}",
        *_validation_lines(verification.validation),
    ]
    return text(lines)


# guard_many()


def render_batch(batch: BatchReport) -> str:
    """The result of guard_many(): a line per model, of a single one its own report."""
    copied = f"{plural(len(batch.copied), 'other file')} of the models' folders"
    if len(batch.outcomes) == 1 and (report := batch.outcomes[0].report):
        lines = [*map(printable, config_line(batch.config)), report.render()]
        return "\n".join([*lines, f"copied    {copied}"] if batch.copied else lines)
    head = ("model", "exit", "coverage", "flipped", "drift", "nearest", "seconds", "output")
    rows = [head, *map(_outcome_cells, batch.outcomes)]
    width = max(len(row[0]) for row in rows)
    failed = sum(outcome.code != 0 for outcome in batch.outcomes)
    lines = [
        *map(printable, config_line(batch.config)),
        *(
            "{:{}}  {:>4}  {:>8}  {:>7}  {:>7}  {:>7}  {:>7}  {}".format(row[0], width, *row[1:])
            for row in rows
        ),
        "",
    ]
    if any(outcome.report and outcome.report.validation for outcome in batch.outcomes):
        lines.append(
            "drift     of the outputs from the original's, relative L2; beside it that of rounding "
            "to nearest"
        )
    lines += _warning_lines([outcome.report for outcome in batch.outcomes if outcome.report])
    if batch.copied:
        lines.append(f"copied    {copied}")
    lines.append(f"guarded   {plural(len(batch.outcomes) - failed, 'model')}, {failed} failed")
    return "\n".join(lines)


def _warning_lines(reports: Sequence[GuardReport]) -> list[str]:
    """What the reports of single models warn of, each warning once, with its models below it."""
    warned: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for report in reports:
        scan = report.scan
        for lines in (
            _fallback_lines(report),
            _feedback_lines(report) if report.preserve == "off" else [],
            _speed_lines(report),
            _quantizer_lines(report),
            _unguarded_lines(report.skipped),
            _coverage_warning(report.tensors, report.skipped),
            verdict_lines(scan.verdict) if scan and scan.verdict.level != "clean" else [],
        ):
            if lines:
                warned[tuple(map(printable, lines))].append(printable(report.input, CELL))
    return [
        line
        for lines, models in warned.items()
        for line in (*lines, f"{INDENT}({_some(models)})" if len(reports) > 1 else "")
        if line
    ]


def _outcome_cells(outcome: ModelOutcome) -> tuple[str, ...]:
    """A row of the summary; the last cell has the outputs, or the error."""
    coverage, flipped, guarded, nearest = "", "", "", ""
    last = (outcome.error or "").removeprefix(f"{outcome.model}: ")
    if report := outcome.report:
        coverage = f"{report.coverage:.2%}"
        flipped = f"{report.flips / max(report.weights, 1):.2%}"
        last = ", ".join(report.outputs)
        if report.validation:
            guarded = f"{pooled(report.validation.guarded_exact):.5f}"
            nearest = f"{pooled(report.validation.plain_exact):.5f}"
    seconds = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    figures = str(outcome.code), coverage, flipped, guarded, nearest, seconds
    return printable(outcome.model), *figures, printable(last)


# pieces of more than one of them


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + f" and {more:,} more" * (more > 0)


def _shared_lines(tensors: Sequence[Tensor]) -> list[str]:
    """Guarded tensors that also are or feed something else."""
    shared = [tensor for tensor in tensors if tensor.others]
    return [f"shared    {t.name}: also {', '.join(t.others)}" for t in shared]


def _unguarded_lines(skipped: Sequence[Skipped]) -> list[str]:
    """What a quantizer could round all the same."""
    left = [tensor for tensor in skipped if tensor.unguarded]
    if not left:
        return []
    values = plural(sum(tensor.size for tensor in left), "value")
    return [
        f"UNGUARDED {plural(len(left), 'tensor')}, {values}, that a quantizer could reach:",
        *(f"{INDENT}{tensor.name}: {tensor.text}" for tensor in left),
    ]


def _coverage_line(tensors: Sequence[Tensor], skipped: Sequence[Skipped]) -> str:
    weights = sum(tensor.weights for tensor in tensors)
    return (
        f"guarded   {weights:,} weights in {plural(len(tensors), 'tensor')}, "
        f"{coverage(tensors, skipped):.2%} of all"
    )


def _quantizer_lines(report: GuardReport) -> list[str]:
    """The tensors of a float output that quantize_dynamic rounds on another grid than their own."""
    if report.options.get("emit", "qdq") == "qdq":
        return []
    by_grid: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in report.tensors:
        if tensor.dynamic:
            by_grid[tensor.dynamic].append(tensor)
    lines = []
    for grid, tensors in by_grid.items():
        counted = _tensors_and_weights([tensor.weights for tensor in tensors])
        named = _some([printable(tensor.name, CELL) for tensor in tensors])
        lines += [
            f"warning   onnxruntime's quantize_dynamic rounds {counted} on another grid ({grid}), "
            f"for which the float output is not guarded: {named}",
            f"{INDENT}{_advice(grid)}",
        ]
    return lines


def _advice(grid: str) -> str:
    """What to do about weights that quantize_dynamic rounds on this grid."""
    scheme, granularity, *_ = grid.split(" ")
    fits = f"--scheme {scheme} --granularity {granularity}"
    if scheme not in FORMATS:  # no grid of a scheme
        fits = "--granularity tensor"
    return f"guard with {fits}, or name their nodes in its nodes_to_exclude"


def _coverage_warning(tensors: Sequence[Tensor], skipped: Sequence[Skipped]) -> list[str]:
    """What most values are that are not guarded, where these are many."""
    covered = coverage(tensors, skipped)
    if covered >= LOW_COVERAGE:
        return []
    sizes: dict[str, int] = defaultdict(int)
    for tensor in skipped:
        sizes[tensor.text] += tensor.size
    reason = max(sizes, key=lambda text: sizes[text])
    values = plural(sizes[reason], "value")
    return [
        f"warning   {1 - covered:.2%} of all float values are not guarded; the largest part, "
        f"{values}: {reason}"
    ]


def _validation_lines(validation: Validation) -> list[str]:
    exact = validation.plain_exact, validation.guarded_exact
    default = validation.plain_default, validation.guarded_default
    runs = {"nearest": exact[0], "guarded": exact[1]}
    fused = any(map(_differs, [*exact[0], *exact[1]], [*default[0], *default[1]]))
    if fused:
        runs |= {"nearest, fused": default[0], "guarded, fused": default[1]}
    rows = [
        (drift.output, run, *_drift_cells(drift))
        for output in zip(*map(joined, runs.values()), strict=True)
        for run, drift in zip(runs, output, strict=True)
    ]
    moved = joined(validation.moved)
    rows += [(drift.output, "moved float", *_drift_cells(drift)) for drift in moved]
    head = ("output", "run", "relative L2", "cosine", "max error", "SQNR dB", "same top-1")
    lines = ["", *table(head, rows), ""]
    if validation.layers:
        lines.append(
            f"sampled   {validation.layers} layers: the model is too large to be run whole, or its "
            "outputs depend on chance, or have shapes that depend on weights"
        )
    inputs = f"{plural(validation.feeds, 'input')} ({validation.inputs})"
    lines += [
        f"valid     on {inputs}: the outputs drift from the original's by "
        f"{pooled(validation.guarded_exact):.5f} (relative L2);",
        f"{INDENT}rounding to nearest: {pooled(validation.plain_exact):.5f}; "
        f"allowed: up to {validation.allowed:.5f} (--max-drift {validation.max_drift:g}, more for "
        f"outputs of few values, at most {MAX_RELATIVE_L2:g})",
    ]
    lines += [
        f"{INDENT}{drift.output}: {drift.kl:.4f} nats (KL divergence) from the original's "
        f"distributions; allowed: up to {MAX_KL:g}"
        for drift in validation.guarded_exact
        if drift.kl is not None
    ]
    if fused:
        lines.append(
            f"{INDENT}fused: as onnxruntime runs the files by default; in the other runs the codes "
            "are decoded first"
        )
    return lines


def _differs(one: Drift, other: Drift) -> bool:
    """Whether two runs drift so differently that it is worth a line."""
    return not math.isclose(one.relative_l2, other.relative_l2, rel_tol=0.01)


def _drift_cells(drift: Drift) -> tuple[str, ...]:
    return (
        f"{drift.relative_l2:.5f}",
        f"{drift.cosine:.6f}",
        f"{drift.max_abs:.3g}",
        f"{drift.sqnr_db:.1f}",
        "" if drift.top1 is None else f"{drift.top1:.1%}",
    )


def verdict_lines(verdict: Verdict) -> list[str]:
    """The level and the grids, and below them the reason."""
    return [f"scan      {verdict.title}", f"{INDENT}{verdict.reason}"]


def skipped_lines(skipped: Sequence[Skipped], names: bool = False) -> list[str]:
    """A line per reason; with `names` also one per tensor, except for 1-D ones and scalars."""
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for tensor in skipped:
        reasons[tensor.text].append(tensor)
    lines = []
    for reason, members in sorted(reasons.items(), key=lambda item: -len(item[1])):
        count = plural(len(members), "tensor")
        values = plural(sum(t.size for t in members), "value")
        size = "" if members[0].is_computed else f", {values}"
        lines.append(f"skipped   {count}{size}: {reason}")
        if names and not members[0].is_vector:
            lines += [f"{INDENT}{t.name}  {'x'.join(map(str, t.shape))}" for t in members]
    return lines


def config_line(config: str | None) -> list[str]:
    """Which file gave options, if one did."""
    return [f"config    {config}"] if config else []


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


def text(lines: Iterable[str]) -> str:
    """Lines for a terminal, whatever the names in them are."""
    return "\n".join(printable(line) for line in lines).rstrip()


def _tensors_and_weights(sizes: Sequence[int]) -> str:
    return f"{plural(len(sizes), 'tensor')}, {plural(sum(sizes), 'weight')}"
