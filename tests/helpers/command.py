"""Calling the command line, and what is in a folder while it works and afterwards."""

import fcntl
import json
import os
import signal
from contextlib import suppress
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import jsonschema
from click.testing import CliRunner

from flipguard_onnx.cli.commands import main
from flipguard_onnx.interrupts import SIGNALS
from flipguard_onnx.io.publish import LOCK, WORKSPACE

SCHEMA = json.loads((files("flipguard_onnx") / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def call(*arguments):
    """Run the command line; the JSON reports that it writes must follow their schema."""
    arguments = [str(a) for a in arguments]
    result = CliRunner().invoke(main, arguments)
    written = [result.stdout] if ("--format", "json") in pairwise(arguments) else []
    for option, value in pairwise(arguments):
        if option == "--report" and Path(value).is_file():
            with suppress(OSError, UnicodeDecodeError):
                written.append(Path(value).read_text())
    for text in written:
        with suppress(json.JSONDecodeError):
            report = json.loads(text)
            if "kind" in report:  # SARIF is none of ours
                VALIDATOR.validate(report)
    return result


def heed_interrupts():
    """For the start of a process: what a shell runs in the background ignores some signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def one_line(result, code=2):
    """The one line that a refused command prints."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("flipguard-onnx: ")
    return result.stderr


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def workspaces(folder):
    """Those of runs at work, in the folder and below; they may go while this looks."""
    return [
        Path(place) / name
        for place, folders, _ in os.walk(folder)
        for name in folders
        if WORKSPACE.fullmatch(name)
    ]


def held(folder):
    """The folder's lock; no run comes to an end until it is closed."""
    lock = (folder / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock
