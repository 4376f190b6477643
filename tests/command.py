"""Calling the command line, and what is left in a folder."""

from click.testing import CliRunner

from flipguard_onnx.cli import main


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def one_line(result, code=2):
    """The one line that a refused command prints."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("flipguard-onnx: ")
    return result.stderr


def names(folder):
    return sorted(path.name for path in folder.iterdir())
