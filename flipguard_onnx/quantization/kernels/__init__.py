"""Choose the device: `get_backend` returns its kernels, `get_scan_kernels` those of a scan."""

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DeviceError
from .protocol import Kernels, ScanKernels
from .threads import max_threads, side_by_side

__all__ = ["DEVICES", "compiling", "get_backend", "get_scan_kernels", "max_threads", "side_by_side"]

DEVICES = ("auto", "cpu", "cuda")


def get_backend(device: str = "auto") -> Kernels:
    """Return the kernels of a device.

    Parameters
    ----------
    device : "cpu", "cuda", or "auto", which is CUDA where there is a GPU that it can use

    Raises
    ------
    DeviceError : the device is unknown or not there
    """
    if device not in DEVICES:
        raise DeviceError("device {found!r} is unknown", found=device, allowed=", ".join(DEVICES))
    missing = None if device == "cpu" else what_cuda_lacks()
    if device == "cuda" and missing:
        raise DeviceError("device 'cuda' is not usable: {found}", found=missing)
    return _cpu_kernels() if device == "cpu" or missing else _cuda_kernels()


@cache
def get_scan_kernels() -> ScanKernels:
    """Return the kernels of a scan; they run on the CPU only."""
    with _cache_directory():
        from . import scan
    return scan


@cache
def _cpu_kernels() -> Kernels:
    with _cache_directory():
        from . import cpu
    return cpu


@cache
def _cuda_kernels() -> Kernels:
    with _cache_directory():
        from .cuda import CudaKernels
    return CudaKernels()


@cache
def what_cuda_lacks() -> str | None:
    """Why "auto" is the CPU; None where it is CUDA."""
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"
    traces = Path("/proc/driver/nvidia/version"), Path("/dev/dxg")  # the latter under Windows
    if not simulated and os.name != "nt" and not any(path.exists() for path in traces):
        return "no NVIDIA driver on this machine"
    try:
        from numba import cuda
    except ImportError as error:
        return f"numba.cuda does not import ({error}); install flipguard-onnx[gpu]"
    if cuda.is_available():  # type: ignore[no-untyped-call]
        return None
    return "numba.cuda finds no NVIDIA GPU that it can use"


@contextmanager
def compiling(notice: Callable[[], None]) -> Iterator[None]:
    """Call `notice` once if the body has to compile a kernel because the cache lacks it."""
    from numba.core import event

    class Listener(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                notice()

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield


@contextmanager
def _cache_directory() -> Iterator[None]:
    """Let numba keep the compiled kernels in a folder named after their source.

    numba's own choice is `__pycache__` beside the module, which is not writable once installed for
    all users, and does not notice changes in `scalar.py`, whose functions the kernels contain.
    """
    import numba

    config: Any = numba.config
    if config.CACHE_DIR:  # the user chose one
        yield
        return
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    config.CACHE_DIR = str(_cache_root() / hashlib.sha256(source).hexdigest()[:16])
    try:
        yield
    finally:
        config.CACHE_DIR = ""


@cache
def _cache_root() -> Path:
    """The user's cache folder; where that is not writable, one that goes with the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = base / "flipguard-onnx"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    folder = tempfile.mkdtemp(prefix="flipguard-onnx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
