"""Options from a file: `flipguard.toml`, or `[tool.flipguard-onnx]` of `pyproject.toml`.

A key is an option without its dashes. At the top it holds for every command that has this option;
in a table with a command's name, for that command, before the top. What the command line gives
comes before both.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import OptionError, first_line
from .options import NumberOrName

FILE = "flipguard.toml"

PYPROJECT = "pyproject.toml"

TABLE = "flipguard-onnx"  # below [tool]


def configured(
    group: click.Group, command: str, file: Path | None
) -> tuple[Path | None, dict[str, Any]]:
    """The file that counts, or None, and what it gives for `command` in the place of defaults.

    Without `file` the current folder is searched. The whole file is checked, whatever the command.
    Raises OptionError, naming the file, the key and what is allowed.
    """
    file, table = _read(file) if file else _found()
    options = {name: _options(group.commands[name]) for name in group.commands}
    everywhere = {key: option for own in options.values() for key, option in own.items()}
    top = {key: value for key, value in table.items() if key not in options}
    settings = _checked(top, everywhere, file, "")
    for name in options:
        own = table.get(name, {})
        if not isinstance(own, dict):
            raise OptionError(
                "{key} is {found!r}", path=file, found=own, allowed="a table", key=name
            )
        checked = _checked(own, options[name], file, f"{name}.")
        settings |= checked if name == command else {}
    return file, settings


def _found() -> tuple[Path | None, dict[str, Any]]:
    for name in (FILE, PYPROJECT):
        if Path(name).is_file():
            file, table = _read(Path(name))
            if table or name == FILE:
                return file, table
    return None, {}


def _read(file: Path) -> tuple[Path, dict[str, Any]]:
    try:
        table: Any = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError("cannot be read: {found}", path=file, found=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise OptionError("is no TOML: {found}", path=file, found=first_line(error)) from None
    for key in ("tool", TABLE) if file.name == PYPROJECT else ():
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise OptionError(
                "{key} is {found!r}", path=file, found=table, allowed="a table", key=key
            )
    return file, table


def _options(command: click.Command) -> dict[str, click.Option]:
    """By key; eager ones, --help and --config, are none of a file's."""
    options = [p for p in command.params if isinstance(p, click.Option) and not p.is_eager]
    return {max(option.opts, key=len).lstrip("-"): option for option in options}


def _checked(
    table: Mapping[str, Any], options: Mapping[str, click.Option], file: Path | None, place: str
) -> dict[str, Any]:
    """Values by the name under which click knows the option."""
    settings = {}
    for key, value in table.items():
        where: dict[str, Any] = {"path": file, "key": place + key}
        if key == "seed":
            raise OptionError("{key} comes from no file: who knows it can prepare a model", **where)
        if key not in options:
            raise OptionError("{key} is unknown", allowed=", ".join(sorted(options)), **where)
        option = options[key]
        types, allowed = _type(option)
        items = value if option.multiple and isinstance(value, list) else [value]
        if option.multiple is not isinstance(value, list) or {type(v) for v in items} - types:
            raise OptionError("{key} is {found!r}", found=value, allowed=allowed, **where)
        try:
            for item in items:
                option.type.convert(item, option, None)
        except click.BadParameter as error:
            raise OptionError("{key}: {found}", found=error.message, **where) from None
        switches_off = option.is_flag and option.flag_value is False
        settings[option.name or key] = not value if switches_off else value
    return settings


def _type(option: click.Option) -> tuple[set[type], str]:
    if option.multiple:
        return {str}, "a list of strings"
    if option.is_flag:
        return {bool}, "true or false"
    if isinstance(option.type, type(click.INT)):
        return {int}, "an integer"
    if isinstance(option.type, type(click.FLOAT)):
        return {int, float}, "a number"
    if isinstance(option.type, NumberOrName):
        return {int, float, str}, "a number or a name"
    return {str}, "a string"
