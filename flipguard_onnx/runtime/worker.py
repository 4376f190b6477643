"""The child process in which onnx's and onnxruntime's C++ see the model; `session` starts it.

The tokenizer beside a model is read here as well, by the tokenizers package.

It takes requests from one pipe and answers into another until that closes. It is no sandbox: what
it keeps away from the caller are crashes, endless runs and the use of too much memory.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx.inliner
import onnx.reference
from onnx import ModelProto, TensorProto, ValueInfoProto

from ..errors import first_line
from ..graph.traversal import STANDARD, bodies, opset_of
from .messages import Array, Channel, Message, UnsendableError, outputs_message
from .settings import StaticQuantization

SESSIONS: dict[int, Any] = {}  # onnxruntime's, by number

LEFT: dict[int, dict[str, Any]] = {}  # values for the next run of a session, by its inputs' names

HIDDEN_DOMAIN = "flipguard.hidden"  # of nodes that onnx's converter is to leave alone

FIRST_PLAIN_CONSTANTS = 4  # the first IR version whose constants need not be inputs as well

TENSOR_TYPES = {  # that the static quantizer looks for, by onnxruntime's names of them
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}

PARENT_CHECK_SECONDS = 1.0

DATA_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph given as bytes


def load(path: str, exact: bool) -> Message:
    """Load a file; the number of its session, and the names of the outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # threads that wait take nothing from the caller's, and compute the same
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if len(cores := os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        # without a number onnxruntime starts a thread on every core, also on those of others
        options.intra_op_num_threads = len(cores)
    model: str | bytes = path
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        model = _in_float32(path)
    if model != path:
        options.add_session_config_entry(DATA_FOLDER, str(Path(path).parent))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    number = max(SESSIONS, default=0) + 1
    SESSIONS[number] = session
    names = [output.name for output in session.get_outputs()]
    return Message({"session": number, "outputs": names})


def _in_float32(path: str) -> str | bytes:
    """The file, or its graph without the accuracy levels at which MatMulNBits rounds its inputs."""
    data = Path(path).read_bytes()
    if b"accuracy_level" not in data:
        return path
    proto = ModelProto.FromString(data)
    for node in (node for body in bodies(proto) for node in body.node):
        kept = [each for each in node.attribute if each.name != "accuracy_level"]
        if node.op_type == "MatMulNBits" and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return proto.SerializeToString()


def run(
    session: int, outputs: list[str], inputs: list[str], arrays: Sequence[Array] = ()
) -> Message:
    """Run a session: the outputs of these names, for arrays that are the inputs of these names."""
    LEFT.pop(session, None)
    feed = dict(zip(inputs, arrays, strict=True))
    return outputs_message(outputs, SESSIONS[session].run(outputs, feed))


def go_on(
    session: int,
    outputs: list[str],
    inputs: list[str],
    successors: dict[str, str],
    arrays: Sequence[Array] = (),
) -> Message:
    """As `run`, where some outputs stay here: the caches of a decoder.

    successors: by the names of these outputs, those of the inputs that they are in the next such
    run unless it gives others
    """
    import onnxruntime

    feed = LEFT.pop(session, {})
    for name, array in zip(inputs, arrays, strict=True):
        feed[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    made = SESSIONS[session].run_with_ort_values([*outputs, *successors], feed)
    LEFT[session] = dict(zip(successors.values(), made[len(outputs) :], strict=True))
    return outputs_message(outputs, [value.numpy() for value in made[: len(outputs)]])


def evaluate(path: str, result: str, max_bytes: int) -> Message:
    """Compute a model without inputs; its outputs' values go into a file, one after another.

    onnx's reference implementation takes over where onnxruntime refuses, or is not installed.
    """
    try:
        values = _computed(path)
    except Exception as refusal:
        try:
            values = list(onnx.reference.ReferenceEvaluator(path).run(None, {}))
        except Exception:
            raise refusal from None
    arrays = [np.ascontiguousarray(value) for value in values if isinstance(value, np.ndarray)]
    if len(arrays) < len(values):
        raise ValueError("it is no tensor")
    size = sum(array.nbytes for array in arrays)
    if size > max_bytes:
        raise ValueError(f"it would take {size:,} bytes; allowed: {max_bytes:,}")
    with open(result, "wb") as file:
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
    types = [onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    shapes = [array.shape for array in arrays]
    return Message({"values": list(zip(types, shapes, strict=True))})


def _computed(path: str) -> list[Any]:
    """The outputs of a model without inputs, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {}))


def check(path: str) -> Message:
    """onnx.checker on a file."""
    onnx.checker.check_model(path)
    return Message({})


def convert(opset: int, arrays: Sequence[Array]) -> Message:
    """The serialized model in the array, at another version of the standard operators.

    Operators that onnxruntime has added to these are kept from the converter, which knows none.
    """
    model = _parsed(arrays[0])
    model.ir_version = max(model.ir_version, FIRST_PLAIN_CONSTANTS)
    before = opset_of(model)
    hidden = [
        node
        for body in bodies(model)
        for node in body.node
        if node.domain in STANDARD and not _is_known(node.op_type, before)
    ]
    for node in hidden:
        node.domain = HIDDEN_DOMAIN
    if hidden:
        model.opset_import.append(onnx.helper.make_opsetid(HIDDEN_DOMAIN, 1))
    model = onnx.version_converter.convert_version(model, opset)
    for node in (node for body in bodies(model) for node in body.node):
        if node.domain == HIDDEN_DOMAIN:
            node.domain = ""
    kept = [each for each in model.opset_import if each.domain != HIDDEN_DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return _serialized(model)


def _is_known(operator: str, opset: int) -> bool:
    """Whether onnx has a standard operator at a version."""
    try:
        onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def inline(arrays: Sequence[Array]) -> Message:
    """The serialized model in the array, with its local functions expanded.

    onnx's inliner (1.23) leaves attributes with defaults unset, and functions of another opset as
    they are unless it is told to convert them.
    """
    model = _parsed(arrays[0])
    functions = {(function.domain, function.name): function for function in model.functions}
    for body in bodies(model):
        for node in body.node:
            if function := functions.get((node.domain, node.op_type)):
                given = {each.name for each in node.attribute}
                defaults = (each for each in function.attribute_proto if each.name not in given)
                node.attribute.extend(defaults)
    flat = onnx.inliner.inline_local_functions(model)
    if flat.functions:
        model = onnx.shape_inference.infer_shapes(model)  # the converter wants all types
        known = {value.name for value in (*model.graph.input, *model.graph.value_info)}
        model.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims)
            for each in model.graph.initializer
            if each.name not in known
        )
        flat = onnx.inliner.inline_local_functions(model, convert_version=True)
    if flat.functions:
        raise ValueError(f"onnx leaves {flat.functions[0].name} as it is")
    return _serialized(flat)


def infer(arrays: Sequence[Array]) -> Message:
    """The serialized model in the array, with inferred shapes."""
    return _serialized(onnx.shape_inference.infer_shapes(_parsed(arrays[0]), data_prop=True))


def preprocess(path: str, result: str) -> Message:
    """onnxruntime's preparation of a model for its static quantizer."""
    from onnxruntime.quantization import quant_pre_process

    tempfile.tempdir = os.path.dirname(result)
    quant_pre_process(path, result, skip_symbolic_shape=True)  # that part needs sympy
    model = onnx.load(result)
    if types := _untyped(model):
        model.graph.value_info.extend(types)
        onnx.save(model, result)
    return Message({})


def _untyped(model: ModelProto) -> list[ValueInfoProto]:
    """The types of values whose types onnx does not infer, as onnxruntime knows them.

    They are those of operators of other domains, or of its own in the standard one; its static
    quantizer leaves a value without a type float, and all that follows.
    """
    import onnxruntime

    main = model.graph
    typed = {v.name for v in (*main.input, *main.output, *main.value_info)}
    made = {name for node in main.node for name in node.output if name}
    if not made - typed:
        return []
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(ValueInfoProto(name=name) for name in sorted(made - typed))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    types = {f"tensor({name})": number for name, number in TENSOR_TYPES.items()}
    return [
        onnx.helper.make_tensor_value_info(value.name, types[value.type], None)
        for value in session.get_outputs()
        if value.name not in typed and value.type in types
    ]


def quantize(
    path: str,
    result: str,
    settings: dict[str, Any],
    inputs: list[list[str]],
    arrays: Sequence[Array] = (),
) -> Message:
    """onnxruntime's static quantizer.

    settings: a StaticQuantization; inputs: names of every feed's inputs, one after another those
    of the arrays.
    """
    import onnxruntime.quantization as ort

    values = iter(arrays)
    feeds = [{name: next(values) for name in names} for names in inputs]

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    told = StaticQuantization(**settings)
    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    types = {"int8": "QInt8", "uint8": "QUInt8", "int16": "QInt16"}
    tempfile.tempdir = os.path.dirname(result)
    ort.quantize_static(
        path,
        result,
        Reader(),
        quant_format=ort.QuantFormat.QDQ,
        op_types_to_quantize=list(told.operators),
        nodes_to_exclude=list(told.excluded_nodes),
        per_channel=told.per_channel,
        activation_type=ort.QuantType[types[told.activations]],
        weight_type=ort.QuantType.QInt8,
        calibrate_method=ort.CalibrationMethod[methods[told.calibration]],
        extra_options={
            "ActivationSymmetric": told.symmetric,
            "QDQDisableWeightAdjustForInt32Bias": True,
        },
    )
    return Message({})


def tokenize(path: str, arrays: Sequence[Array]) -> Message:
    """The token ids of texts, one text after the other, by a tokenizer.json.

    arrays: the texts, as bytes of JSON.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(json.loads(arrays[0].tobytes()))
    ids = [number for encoding in encodings for number in encoding.ids]
    return Message({}, [np.array(ids, np.int64)])


REQUESTS = {
    f.__name__: f
    for f in (
        load,
        run,
        go_on,
        evaluate,
        check,
        convert,
        inline,
        infer,
        preprocess,
        quantize,
        tokenize,
    )
}


def serve(channel: Channel) -> None:
    """Answer requests until the other side closes its end.

    A request has the fields `request` (a name in REQUESTS), `arguments`, `memory` (bytes that it
    may take) and `forget` (numbers of sessions). An answer has the field `status`: "done" (the
    rest of the message is the result), "failed" or "unsendable" (the result is nothing that a
    message can hold), the last two with one line in `problem`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            call = channel.receive()
        except EOFError:
            return
        for number in call.fields["forget"]:
            SESSIONS.pop(number, None)
            LEFT.pop(number, None)
        with _memory_limit(call.fields["memory"]):
            _answer(channel, call)


def _answer(channel: Channel, call: Message) -> None:
    arguments = dict(call.fields["arguments"])
    if call.arrays:
        arguments["arrays"] = call.arrays
    try:
        result = REQUESTS[call.fields["request"]](**arguments)
        channel.send(Message({"status": "done"} | result.fields, result.arrays))
    except UnsendableError as error:
        channel.send(Message({"status": "unsendable", "problem": first_line(error)}))
    except Exception as error:  # onnxruntime raises bare exceptions of many types
        channel.send(Message({"status": "failed", "problem": first_line(error)}))


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Grant `size` bytes for one request; taking in the next one is bounded by its sender."""
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def main() -> None:
    """Entry point of the process: the two pipes are the last arguments."""
    requests, answers = (int(number) for number in sys.argv[-2:])
    serve(Channel(requests, answers))


def _serialized(proto: ModelProto) -> Message:
    return Message({}, [np.frombuffer(proto.SerializeToString(), np.uint8)])


def _parsed(content: Array) -> ModelProto:
    return ModelProto.FromString(content.tobytes())


def _leave_with(parent: int) -> None:
    """End when the parent does, even in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
