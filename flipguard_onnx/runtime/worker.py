"""The child process in which onnx's and onnxruntime's C++ see the model; started by `runtime`.

It takes requests from one pipe and answers into another until that closes. It is no sandbox: it
keeps a crash, a hang or a hunger for memory away from the caller.
"""

import os
import resource
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import onnx.inliner
from onnx import ModelProto

from ..errors import first_line

SESSIONS: dict[int, Any] = {}


def load(path: str, exact: bool) -> tuple[int, list[str]]:
    """Load a file; the number of its session, and the names of the outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if len(cores := os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        options.intra_op_num_threads = len(cores)  # by itself it takes all, and moves off ours
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    number = max(SESSIONS, default=0) + 1
    SESSIONS[number] = session
    return number, [output.name for output in session.get_outputs()]


def run(number: int, names: list[str] | None, feed: dict[str, Any]) -> list[Any]:
    """Run a session."""
    results: list[Any] = SESSIONS[number].run(names, feed)
    return results


def check(path: str) -> None:
    """onnx.checker on a file."""
    onnx.checker.check_model(path)


def convert(proto: bytes, opset: int) -> bytes:
    """The model at another version of the standard operators."""
    return onnx.version_converter.convert_version(_parsed(proto), opset).SerializeToString()


def inline(proto: bytes) -> bytes:
    """The model with its local functions expanded."""
    return onnx.inliner.inline_local_functions(_parsed(proto)).SerializeToString()


def preprocess(path: str, result: str) -> None:
    """onnxruntime's preparation of a model for its static quantizer."""
    from onnxruntime.quantization import quant_pre_process

    tempfile.tempdir = os.path.dirname(result)
    quant_pre_process(path, result, skip_symbolic_shape=True)  # that part needs sympy


def quantize(
    path: str,
    result: str,
    operators: list[str],
    excluded: list[str],
    activations: str,
    symmetric: bool,
    method: str,
    per_channel: bool,
    feeds: list[dict[str, Any]],
) -> None:
    """onnxruntime's static quantizer, with weights in symmetric int8."""
    import onnxruntime.quantization as ort

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    types = {"int8": "QInt8", "uint8": "QUInt8", "int16": "QInt16"}
    tempfile.tempdir = os.path.dirname(result)
    ort.quantize_static(
        path,
        result,
        Reader(),
        quant_format=ort.QuantFormat.QDQ,
        op_types_to_quantize=operators,
        nodes_to_exclude=excluded,
        per_channel=per_channel,
        activation_type=ort.QuantType[types[activations]],
        weight_type=ort.QuantType.QInt8,
        calibrate_method=ort.CalibrationMethod[methods[method]],
        extra_options={
            "ActivationSymmetric": symmetric,
            "QDQDisableWeightAdjustForInt32Bias": True,
        },
    )


REQUESTS = {f.__name__: f for f in (load, run, check, convert, inline, preprocess, quantize)}


def serve(requests: Connection, answers: Connection) -> None:
    """Answer requests with (True, result) or (False, the error's first line).

    A request is a name, its arguments, the bytes of memory it may take, and sessions to forget.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            name, arguments, memory, dropped = requests.recv()
        except EOFError:
            return
        for number in dropped:
            SESSIONS.pop(number, None)
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        soft = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, most))
        try:
            answers.send((True, REQUESTS[name](*arguments)))
        except Exception as error:  # onnxruntime raises bare exceptions of many types
            answers.send((False, first_line(error)))


def main() -> None:
    """Entry point of the process: the two pipes are the last arguments."""
    requests, answers = (int(number) for number in sys.argv[-2:])
    serve(Connection(requests, writable=False), Connection(answers, readable=False))


def _parsed(proto: bytes) -> ModelProto:
    model = ModelProto()
    model.ParseFromString(proto)
    return model


def _leave_with(parent: int) -> None:
    """End when the parent does, even in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
