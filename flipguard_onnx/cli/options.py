"""The options of the command line, in the groups in which `--help` shows them.

What guard() can be told comes from `GuardOptions`; here are the others.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ..pipeline.options import About, described

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(path_type=Path)
GROUPS = ("Model and output", "Format", "Protection", "Accuracy", "Running", "Reports")
FORMAT_OPTIONS = (
    "scheme",
    "granularity",
    "block_size",
    "scale",
    "reduce_range",
    "include",
    "exclude",
    "int8",
)


class Option(click.Option):
    """An option that belongs to a group."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class NumberOrName(click.ParamType[float | str]):
    """A number where it is one, else a string; which are allowed GuardOptions says."""

    name = "number or name"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        """What was written, as what it is."""
        try:
            return float(value)
        except ValueError:
            return str(value)


class GroupedCommand(click.Command):
    """A command whose help shows its options group by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue
            if record := parameter.get_help_record(ctx):
                records.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for group in (*GROUPS, "Other"):
            if group in records:
                with formatter.section(group):
                    formatter.write_dl(records[group])


def option(*names: str, group: str = "Other", **settings: Any) -> Decorator:
    """click.option() in a group."""
    return click.option(*names, cls=Option, group=group, **settings)


def together(options: Iterable[Decorator]) -> Decorator:
    """One decorator for several options, which `--help` shows in this order."""
    ordered = list(options)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(ordered):
            command = each(command)
        return command

    return decorate


def guard_options(*names: str, **changed: Any) -> Decorator:
    """The options of `GuardOptions` with these names, or all; settings of click that differ."""
    return together(
        _click_option(name, default, about, changed)
        for name, default, about in described()
        if not names or name in names
    )


def _click_option(name: str, default: Any, about: About, changed: dict[str, Any]) -> Decorator:
    flag = f"--{name.replace('_', '-')}"
    settings: dict[str, Any] = {"group": about.group, "help": about.help, "default": default}
    settings["metavar"] = about.metavar
    if default is True:  # the flag switches it off
        settings |= {"is_flag": True, "flag_value": False}
        return option(f"--no-{name.replace('_', '-')}", name, **settings)
    if default is False:
        settings["is_flag"] = True
    elif isinstance(default, tuple):
        settings["multiple"] = True
    elif name in ("data", "resume"):
        settings["type"] = FILE
    else:
        settings["type"] = _type(default, about)
    settings |= changed
    settings["show_default"] = bool(settings["default"]) and not settings.get("is_flag", False)
    return option(flag, **settings)


def _type(default: Any, about: About) -> Any:
    """How click reads a value of the option."""
    if about.range is None:
        if len({type(choice) for choice in about.choices}) > 1:
            return NumberOrName()
        kind = type(about.choices[0])
        return click.Choice(about.choices) if kind is str else kind
    if about.range.high is not None:  # GuardOptions says it in one line
        return type(default)
    if isinstance(default, float):
        return click.FloatRange(min=about.range.low, min_open=about.range.low_open)
    return click.IntRange(min=int(about.range.low))


output_option = option(
    "-o",
    "--output",
    group="Model and output",
    type=click.Path(),  # a string: a Path does not keep the slash behind the name of a folder
    help="For several models: a folder.  [default: MODEL.flipguard-SCHEME.onnx beside the input]",
)

batch_options = together(
    [
        option(
            "--jobs",
            group="Running",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Several models: how many at a time, each on its share of the cores.",
        ),
        option(
            "--scheduler",
            group="Running",
            metavar="ADDRESS",
            help="Several models: let the workers of this Dask cluster do it.",
        ),
    ]
)

page_options = together(
    [
        option("--html", group="Reports", type=FILE, help="One model: write an HTML page here."),
        option("--sbom", group="Reports", type=FILE, help="One model: write a CycloneDX ML-BOM."),
    ]
)

target_option = option(
    "--target",
    group="Model and output",
    type=click.Choice(("tensorrt", "qnn", "openvino")),
    help="Look at a quantized MODEL instead: what would this runtime not take?",
)

report_options = together(
    [
        option("--report", group="Reports", type=FILE, help="Write JSON here."),
        option("--quiet", group="Reports", is_flag=True, help="Print errors only."),
    ]
)


def config_option(read: Callable[..., Any]) -> Decorator:
    """`read` is click's callback; it runs before defaults are looked up."""
    return option(
        "--config",
        group="Running",
        type=FILE,
        is_eager=True,
        callback=read,
        help="TOML file with options.  [default: flipguard.toml, else [tool.flipguard-onnx] of "
        "pyproject.toml, in the current folder]",
    )
