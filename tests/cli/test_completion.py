"""The shell's completion, as a person at an interactive bash meets it."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASH = shutil.which("bash")
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.skipif(not BASH, reason="needs bash"),
    pytest.mark.skipif(
        not (BIN / "flipguard-onnx").exists(), reason="needs the package to be installed"
    ),
]


class Terminal:
    def __init__(self, folder):
        self.master, slave = pty.openpty()
        path = f"{BIN}:{os.environ['PATH']}"
        self.bash = subprocess.Popen(
            [BASH, "--norc", "--noprofile", "-i"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=os.environ | {"PATH": path, "PS1": "$ ", "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)

    def expect(self, typed, wanted):
        """Type, and read until `wanted` appears after what was typed."""
        os.write(self.master, typed.encode())
        seen, end = "", time.monotonic() + 60
        while wanted not in seen:
            assert time.monotonic() < end, f"{typed!r}: {seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                seen += os.read(self.master, 4096).decode()

    def close(self):
        self.bash.kill()
        self.bash.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    (tmp_path / "encoder.onnx").touch()
    (tmp_path / "models").mkdir()
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_commands_options_values_and_files(terminal):
    setup = 'eval "$(_FLIPGUARD_ONNX_COMPLETE=bash_source flipguard-onnx)"; echo re"ady"\r'
    terminal.expect(setup, "ready")
    clear = "\x15"  # Ctrl-U
    for line, rest in (
        ("flipguard-onnx ver", "ify "),
        ("flipguard-onnx enc", "oder.onnx "),
        ("flipguard-onnx mod", "els/"),
        ("flipguard-onnx --preser", "ve "),
        ("flipguard-onnx encoder.onnx --max-d", "rift "),
        ("flipguard-onnx guard enc", "oder.onnx "),
        ("flipguard-onnx guard encoder.onnx --scheme nf", "4 "),
        ("flipguard-onnx scan --fail-on ali", "gned "),
    ):
        terminal.expect(f"{clear}{line}\t", f"{line}{rest}")
