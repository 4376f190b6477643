"""The options of the command line, in the groups in which commands take them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SCHEME_NAMES = ("int8", "int4", "nf4", "fp4")

FILE = click.Path(path_type=Path)


def together(*options: Decorator) -> Decorator:
    """One decorator for several options, which `--help` shows in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


format_options = together(
    click.option(
        "--scheme",
        type=click.Choice(SCHEME_NAMES),
        default="int8",
        show_default=True,
        help="Number format of the output.",
    ),
    click.option(
        "--granularity",
        type=click.Choice(("channel", "tensor")),
        default="channel",
        show_default=True,
        help="int8: one scale per output channel or per tensor.",
    ),
    click.option(
        "--block-size",
        type=int,
        help="4 bits: weights per scale: 16, 32, 64, 128 or 256.  [default: int4 32, nf4 and fp4 "
        "64]",
    ),
    click.option(
        "--include", multiple=True, metavar="PATTERN", help="Guard only tensors like this."
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave tensors like this."),
    click.option(
        "--int8",
        multiple=True,
        metavar="PATTERN",
        help="Keep tensors like this at 8 bits under a 4-bit scheme.",
    ),
)

draw_options = together(
    click.option(
        "--int8-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="Keep the most sensitive tensors at 8 bits, up to this share of the weights (0.25).",
    ),
    click.option(
        "--policy",
        type=click.Choice(("unbiased", "topk", "none")),
        default="unbiased",
        show_default=True,
        help="Which weights cross a boundary; none is plain rounding.",
    ),
    click.option(
        "--tau",
        type=float,
        default=1.0,
        show_default=True,
        help="unbiased: draw only weights this near to a boundary, in half-gaps; 1 draws all.",
    ),
    click.option(
        "--ratio", type=float, default=0.1, show_default=True, help="topk: share of each block."
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Of the draws.  [default: fresh entropy, recorded]",
    ),
    click.option(
        "--preserve",
        type=click.Choice(("auto", "off", "synthetic", "data")),
        default="auto",
        show_default=True,
        help="Feed rounding errors forward so that layers' outputs are preserved, on made-up "
        "inputs or those of --data; auto: where it takes less than a minute.",
    ),
    click.option(
        "--device",
        type=click.Choice(("auto", "cpu", "cuda")),
        default="auto",
        show_default=True,
        help="Where the kernels run.",
    ),
)

validation_options = together(
    click.option(
        "--data",
        type=FILE,
        help=".npz, or folder of them, with inputs to run the model on.  [default: made up]",
    ),
    click.option(
        "--max-memory",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="MiB for the statistics of --preserve; of a larger model only sampled layers are run.",
    ),
    click.option(
        "--max-drift",
        type=click.FloatRange(min=0, min_open=True),
        default=3.0,
        show_default=True,
        help="Allowed drift, as a multiple of plain quantization's.",
    ),
)

output_options = together(
    click.option("--no-validate", is_flag=True, help="Write without running the result."),
    click.option(
        "--emit",
        type=click.Choice(("qdq", "float", "both")),
        default="qdq",
        show_default=True,
        help="A quantized graph, or the same graph with moved weights for your own quantizer.",
    ),
    click.option(
        "--activations",
        type=click.Choice(("int8", "uint8", "int16")),
        help="int8: quantize activations to this, too, by onnxruntime's static quantizer on the "
        "inputs of --data; on made-up ones it is weaker.",
    ),
    click.option(
        "--calibration",
        type=click.Choice(("minmax", "entropy", "percentile")),
        default="minmax",
        show_default=True,
        help="How the ranges of activations are found.",
    ),
    click.option(
        "--symmetric", is_flag=True, help="MomentRecorder with their zero point in the middle."
    ),
    click.option("--standard-ops", is_flag=True, help="No operators of com.microsoft."),
    click.option(
        "-o",
        "--output",
        type=FILE,
        help="For many models: folder.  [default: MODEL.flipguard-SCHEME.onnx beside the input]",
    ),
    click.option("--force", is_flag=True, help="Overwrite the output."),
)

fleet_options = together(
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Many models: how many at a time, each on its share of the cores.",
    ),
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Many models: let the workers of this Dask cluster do it.",
    ),
)


def config_option(read: Callable[..., Any]) -> Decorator:
    """`read` is click's callback; it runs before defaults are looked up."""
    return click.option(
        "--config",
        type=FILE,
        is_eager=True,
        callback=read,
        help="TOML file with options.  [default: flipguard.toml, else [tool.flipguard-onnx] of "
        "pyproject.toml, in the current folder]",
    )


report_options = together(
    click.option("--report", type=FILE, help="Write JSON here."),
    click.option("--quiet", is_flag=True, help="Print errors only."),
)
