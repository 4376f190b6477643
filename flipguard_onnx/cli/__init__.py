"""The command line: parse, call the library, print, return an exit code."""

from .commands import main

__all__ = ["main"]
