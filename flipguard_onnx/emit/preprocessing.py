"""A model as onnxruntime's static quantizer takes it: pre-processed, with the names that it had."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto
from onnx.numpy_helper import from_array

from .. import runtime
from ..calibration.inputs import node_readers
from ..errors import ModelError, UnsupportedModelError, ValidationError
from ..graph.copies import IndexedModel
from ..graph.operators import operator_of
from ..graph.traversal import attribute, bodies, graphs, output_names, subgraphs
from ..io.model import INLINE_LIMIT, Model, open_model
from ..io.writer import Output
from .opset import converted
from .rewriter import IR_VERSION, drop_lost_defaults, remove_named

CALIBRATORS = ("ReduceMax", "ReduceMin")  # the calibration adds such nodes, of just these names

QUANTIZER_SUFFIXES = (  # of the names that it makes
    *("_quantized", "_quantized_scale", "_quantized_zero_point", "_scale", "_zero_point"),
    *("_QuantizeLinear_Input", "_QuantizeLinear_Output", "_DequantizeLinear_Output"),
)

OPSETS = {"int8": 13, "uint8": 13, "int16": 21}  # the first with QuantizeLinear to each type


def preprocessed(source: Model, activations: str, max_bytes: int, folder: Path) -> Model:
    """The source as onnxruntime's pre-processing leaves it: constants folded, BatchNormalization
    merged into Conv, shapes inferred, at an opset that has the activations' type.

    Parameters
    ----------
    source : the model
    activations : the type that its activations will have
    max_bytes : the size of the largest model that is loaded
    folder : for intermediate files

    Raises
    ------
    UnsupportedModelError : the model is larger than `max_bytes`, or cannot be processed
    """
    max_bytes = min(max_bytes, INLINE_LIMIT)
    if source.size > max_bytes:
        raise UnsupportedModelError(
            "has {found:,} bytes, which onnxruntime's quantizer would load whole",
            path=source.path,
            found=source.size,
            allowed=f"up to {max_bytes:,} with --activations (--max-memory, and 1 GiB)",
        )
    converted_source = Output(folder / "converted", None, external=False)
    proto = ModelProto()
    opset = OPSETS[activations]
    proto.CopyFrom(converted(source, opset, IndexedModel.of(source.proto)).proto)
    converted_source.save(proto, source)
    result = folder / "preprocessed.onnx"
    try:
        runtime.preprocess(converted_source.path, result, source.size)
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            "onnxruntime's pre-processing refuses it: {found}", found=str(error), path=source.path
        ) from None
    try:
        made = open_model(result)
    except ModelError:  # without nodes
        raise UnsupportedModelError(
            "its outputs depend on no inputs; go without --activations", path=source.path
        ) from None
    _drop_new_inputs(made.proto, proto)
    _keep_tied(made.proto, proto)
    main = made.proto.graph
    for node in main.node:  # those that stay float are listed by name
        if not node.name and node.op_type not in CALIBRATORS:
            node.name = f"{node.output[0]}_{node.op_type}"
    _restore_names(made.proto, source.proto)
    _widen_constants(made)
    _separate_biases(made)
    drop_lost_defaults(made.proto, source.proto)
    used = {node.domain for body in bodies(made.proto) for node in body.node}
    for index in reversed(range(len(made.proto.opset_import))):
        if made.proto.opset_import[index].domain not in {"", *used}:
            del made.proto.opset_import[index]
    del made.proto.metadata_props[:]
    made.proto.metadata_props.extend(source.proto.metadata_props)
    return replace(source, proto=made.proto, payloads=made.payloads)


def _drop_new_inputs(proto: ModelProto, source: ModelProto) -> None:
    """Let constants be no inputs that are none in the source.

    onnxruntime lists all of them as inputs in models of before IR version 4, which know no others.
    """
    known = {value.name for value in source.graph.input}
    remove_named(proto.graph.input, *({value.name for value in proto.graph.input} - known))
    proto.ir_version = max(proto.ir_version, IR_VERSION)


def _keep_tied(proto: ModelProto, source: ModelProto) -> None:
    """Compute outputs from constants again where onnxruntime evaluated them, if these are there.

    What is an output as well as a weight, transposed for example, is to be what the guarded weight
    is, and no second constant.
    """
    main = proto.graph
    constants = {tensor.name for tensor in main.initializer}
    before = [n for n in source.graph.node if not any(map(subgraphs, n.attribute))]
    computed = {name for n in before if n.op_type != "Constant" for name in n.output}
    evaluated = [name for name in output_names(main) if name in constants & computed]
    there = constants.difference(evaluated).union(*(node.output for node in main.node), [""])
    for name in evaluated:
        wanted, nodes = {name}, []
        for node in reversed(before):
            if wanted.intersection(node.output):
                nodes.append(node)
                wanted.update(set(node.input) - there)
        made = {each for node in nodes for each in node.output}
        if wanted <= made:
            remove_named(main.initializer, name)
            nodes = [*reversed(nodes), *main.node]
            del main.node[:]
            main.node.extend(nodes)
            there |= made


def _restore_names(proto: ModelProto, source: ModelProto) -> None:
    """Give weights that onnxruntime merged with others the names of those, which options name.

    It calls them ConvBnFusion_W_NAME and the like.
    """
    before = {tensor.name for tensor in source.graph.initializer}
    before |= {n.output[0] for n in source.graph.node if n.op_type == "Constant"}
    main = proto.graph
    taken = {tensor.name for tensor in main.initializer}
    taken.update(name for graph in graphs(proto) for node in graph.node for name in node.output)
    renamed = {}
    for tensor in main.initializer:
        if tensor.name in before or "Fusion_" not in tensor.name:
            continue
        parts = tensor.name.split("_")
        ends = ("_".join(parts[start:]) for start in range(1, len(parts)))
        name = next((end for end in ends if end in before - taken), None)
        if name:
            taken.add(name)
            renamed[tensor.name] = tensor.name = name
    _read_instead(proto, renamed)


def _widen_constants(model: Model) -> None:
    """Cast(w) -> w in float32, for constants of 16 bits that are read in no other way.

    Where onnxruntime computes a 16-bit operator in float32, it casts what the operator reads; its
    static quantizer takes what comes out of a Cast for an activation.
    """
    main = model.proto.graph
    readers = node_readers(node for graph in graphs(model.proto) for node in graph.node)
    outputs = {*output_names(main)}
    inputs = {value.name for value in main.input}
    left = {id(n) for n in main.node if _widens(n) and not outputs.intersection(n.output)}
    renamed: dict[str, str] = {}
    dropped: set[int] = set()
    for tensor in main.initializer:
        casts = {id(node): node.output[0] for node in readers[tensor.name]}
        is_short = tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if is_short and tensor.name not in inputs and casts and casts.keys() <= left:
            tensor.CopyFrom(from_array(model.array(tensor).astype("float32"), tensor.name))
            renamed.update(dict.fromkeys(casts.values(), tensor.name))
            dropped |= casts.keys()
    kept = [node for node in main.node if id(node) not in dropped]
    del main.node[:]
    main.node.extend(kept)
    _read_instead(model.proto, renamed)


def _widens(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT


def _separate_biases(model: Model) -> None:
    """Give each operator a bias that nothing else reads, and multiply out Gemm's beta.

    onnxruntime's static quantizer (1.32) ignores beta, and gives a bias one scale, which follows
    from what one of its readers reads besides.
    """
    main = model.proto.graph
    readers = node_readers(node for graph in graphs(model.proto) for node in graph.node)
    constants = {tensor.name: tensor for tensor in main.initializer}
    outputs = {*output_names(main)}
    replaced = set()
    for node in main.node:
        name = bias_of(node)
        if name not in constants:
            continue
        beta = attribute(node, "beta", 1.0)
        if beta != 1 or len(readers[name]) > 1 or name in outputs:
            bias = model.array(constants[name])
            node.input[2] = f"{node.output[0]}_{name}"
            main.initializer.append(from_array((beta * bias).astype(bias.dtype), node.input[2]))
            remove_named(node.attribute, "beta")
            replaced.add(name)
    used = {name for graph in graphs(model.proto) for node in graph.node for name in node.input}
    used |= {name for graph in graphs(model.proto) for name in output_names(graph)}
    for name in replaced - used:
        remove_named(main.initializer, name)


def make_room(proto: ModelProto) -> dict[str, str]:
    """Rename what has a name that onnxruntime's static quantizer (1.32) will give to something new.

    It looks after none but its own. The model's inputs and outputs keep their names; what gives
    such a name to the quantizer gets another one.

    Returns
    -------
    The new names by the old ones.
    """
    main = proto.graph
    kept = {value.name for value in (*main.input, *main.output)}
    made = [tensor.name for tensor in main.initializer]
    made += [name for node in main.node for name in node.output if name]
    names = {*made, *kept}
    taken = names | {name + end for name in names for end in QUANTIZER_SUFFIXES}
    in_the_way = set()
    for name in names:
        for end in QUANTIZER_SUFFIXES:
            if name.endswith(end) and (stem := name.removesuffix(end)) in names:
                in_the_way.add(stem if name in kept else name)
    renamed = {}
    for name in made:
        if name in in_the_way - kept:
            fresh = f"{name}_renamed"
            while fresh in taken:
                fresh += "_"
            taken.add(fresh)
            renamed[name] = fresh
    if renamed:
        _read_instead(proto, renamed)
        for tensor in main.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for node in main.node:
            node.output[:] = [renamed.get(name, name) for name in node.output]
        for value in main.value_info:
            value.name = renamed.get(value.name, value.name)
        del main.quantization_annotation[:]
    return renamed


def bias_of(node: NodeProto) -> str:
    """The name of the bias beside the weight that onnxruntime's static quantizer quantizes."""
    operator = operator_of(node)
    static = operator and operator.static and len(node.input) > 2
    return str(node.input[2]) if static else ""


def _read_instead(proto: ModelProto, names: Mapping[str, str]) -> None:
    """Let all nodes read values under other names."""
    for graph in graphs(proto):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        for value in graph.output if graph is not proto.graph else ():
            value.name = names.get(value.name, value.name)
