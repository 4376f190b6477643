"""`python -m flipguard_onnx`, and the command `flipguard-onnx`."""

import signal

from .cli import main
from .interrupts import SIGNALS


def run() -> None:
    """Run the command line. Once that is done there is nothing left that a signal could end."""
    try:
        main()
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    run()
