"""Numbers, settings and columns in words, for the text and for the HTML page."""

from collections.abc import Mapping

from ..formats import FORMATS
from .guard import GuardReport
from .scan import SkipReason

SCAN_TERMS = {  # columns of a scan
    "near": "share of the weights at a distance below 0.1 from a decision boundary (0: on the "
    "boundary, 1: on a level); 10% if spread evenly",
    "placebo": "near on grids with scales that no quantizer would choose",
    "peak": "share of the weights gathered at one distance on this grid and on no placebo",
    "at": "distance of that peak",
    "edge": "share of the weights gathered below 0.1 on this grid and on no placebo",
    "collapse": "share of the weights that lose more than half of their magnitude when rounded",
    "outlier": "largest / second largest magnitude of a block (median)",
    "loss": "relative L2 error of the weights without the largest eighth in every run of 32, when "
    "rounded; mean over the runs",
    "clipped": "share of the weights beyond the last level of a grid that does not reach as far on "
    "one side as on the other",
}


def scheme_in_words(report: GuardReport) -> str:
    """The scheme, and how many weights share a scale."""
    share = f"per {report.granularity}"
    if report.block_size is not None:
        share += f" of {report.block_size} weights"
    words = f"{report.scheme}, one scale {share}"
    if FORMATS[report.scheme].has_zeros:
        words += ", with zero points"
    if isinstance(report.scale, str):
        words += f", by {report.scale}"
    elif "/" in report.grid:
        words += f", largest magnitude / {report.scale:g}"
    if report.reduce_range:
        words += ", 7 bits"
    if report.grid in {tensor.grid for tensor in report.tensors}:
        return words
    return f"{words}; but no weight got it: all are int8, one scale per channel"


def fallbacks(report: GuardReport) -> list[tuple[str, str]]:
    """Tensors that got another form than the one asked for: their name or number; form and why."""
    named: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.fallback:
            named.setdefault(f"{tensor.scheme}, since {tensor.fallback}", []).append(tensor.name)
    for left in report.skipped:
        if left.reason is SkipReason.COLLAPSES:
            named.setdefault(f"float, since {left.detail}", []).append(left.name)
    return [
        (names[0] if len(names) == 1 else f"{len(names)} tensors", what)
        for what, names in named.items()
    ]


def policy_in_words(report: GuardReport) -> str:
    """The policy with its parameter."""
    return {
        "unbiased": f"unbiased, tau {report.tau}",
        "topk": f"topk, ratio {report.ratio}",
        "none": "none (round to nearest)",
    }[report.policy]


def fingerprint(sha256: str, data_sha256: Mapping[str, str]) -> str:
    """What a model is known by: the starts of the digests of its file and of its data files."""
    starts = [digest[:16] for digest in data_sha256.values()]
    if len(starts) > 3:
        starts[3:] = [f"{len(starts) - 3:,} more"]
    data = f", of its data {', '.join(starts)}" if starts else ""
    return f"sha256 {sha256[:16]}{data}"


def plural(count: int, noun: str) -> str:
    """A number with what it counts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share with two decimals; what is above 0 is not shown as 0."""
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def megabytes(size: int) -> str:
    """A number of bytes in units of 10^6; a small one in units of 10^3, or as it is."""
    if size < 1e4:
        return f"{size / 1e3:.2f} kB" if size >= 1e3 else plural(size, "byte")
    return f"{size / 1e6:.2f} MB"
