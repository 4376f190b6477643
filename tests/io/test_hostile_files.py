"""Files from strangers: every one gets one line and exit code 2, and nothing is written."""

import io
import os
import pickle
import zipfile

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tests.helpers.command import call
from tests.helpers.hostile import (
    MATRIX,
    changed,
    emptied,
    external,
    length_prefixed,
    one_line,
    refused,
    shape,
    written,
)
from tests.helpers.samples import SAMPLES, F, matmul, model, node, save, weights

# --- external data


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "in/../../secret", "a/../b"])
def test_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64 * 64 * 4))
    (tmp_path / "in").mkdir()
    message = refused(external(tmp_path / "in", location=location))
    assert f"'w' has its data at {location!r}; allowed: a file under the model's folder" in message


def test_absolute_path_inside_the_folder(tmp_path):
    message = refused(external(tmp_path, location=str(tmp_path / "model.onnx.data")))
    assert "allowed: a file under the model's folder" in message


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "loop"])
def test_link_that_leads_outside(tmp_path, target):
    (tmp_path / "secret").write_bytes(bytes(64 * 64 * 4))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(target)
    message = refused(external(tmp_path / "in", location="loop"))
    assert "allowed: a file under the model's folder" in message


@pytest.mark.parametrize("location", ["a\0b", "x" * 5000, "a/" * 3000])
def test_location_that_is_no_file_name(tmp_path, location):
    assert "tensor 'w'" in refused(external(tmp_path, location=location))


def test_data_in_a_folder_a_pipe_or_a_device(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for location in ("folder", "pipe"):
        assert "allowed: a regular file" in refused(external(tmp_path, location=location))
    assert "allowed: a file under" in refused(external(tmp_path, location="zero"))


def test_a_device_inside_the_folder(tmp_path):
    try:
        os.mknod(tmp_path / "null", 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    assert "allowed: a regular file" in refused(external(tmp_path, location="null"))


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "1e3", "0x10", "1_0", " 1", "٣", "9" * 40, "many"])
def test_offsets_and_lengths_that_are_no_numbers(tmp_path, key, value):
    message = refused(external(tmp_path, **{key: value}))
    assert f"tensor 'w' has the {key} {value[:30]!r}; allowed: a number from 0 on" in message


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "1"},
        {"offset": str(1 << 62)},
        {"length": "4"},
        {"length": str(1 << 62)},
        {"length": "0"},
    ],
)
def test_regions_past_the_end_or_of_the_wrong_length(tmp_path, entries):
    assert "tensor 'w' needs 16384 bytes but refers to" in refused(external(tmp_path, **entries))


def two_tensors(folder, second, dtype=TensorProto.FLOAT):
    path = save(SAMPLES["nested"](), folder, external=True)
    proto = onnx.load(path, load_external_data=False)
    other = TensorProto(name="other", data_type=dtype, dims=second["dims"])
    other.data_location = TensorProto.EXTERNAL
    for key in ("location", "offset", "length"):
        value = second.get(key, "model.onnx.data")
        other.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(other)
    path.write_bytes(proto.SerializeToString())
    return path


def test_regions_that_overlap(tmp_path):
    path = two_tensors(tmp_path, {"dims": [64, 63], "offset": 4, "length": 64 * 63 * 4})
    assert "overlap in 'model.onnx.data'" in refused(path)


def test_one_region_under_two_types(tmp_path):
    path = two_tensors(
        tmp_path, {"dims": [64, 64], "offset": 0, "length": 16384}, TensorProto.INT32
    )
    assert "allowed: the same bytes as the same type, or none in common" in refused(path)


def test_one_region_for_two_tensors_of_one_type(tmp_path):
    path = two_tensors(tmp_path, {"dims": [64, 64], "offset": 0, "length": 16384})
    assert call("inspect", path).exit_code == 0


def test_data_that_is_shared_to_swell_the_output(tmp_path):
    path = save(matmul(MATRIX), tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    for number in range(100):
        proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
        proto.graph.initializer[-1].name = f"w{number}"
    path.write_bytes(proto.SerializeToString())
    assert "tensors refer to 1654784 bytes of 'model.onnx.data', which has 16384" in refused(path)


def test_an_unaligned_offset_gives_what_an_aligned_one_does(tmp_path):
    plain = save(matmul(MATRIX), tmp_path, "plain.onnx")
    path = external(tmp_path, offset="3")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(b"abc" + data.read_bytes())
    for source, target in ((plain, "a.onnx"), (path, "b.onnx")):
        arguments = ("--seed", 1, "--no-validate", "--preserve", "off", "-o", tmp_path / target)
        assert call(source, *arguments).exit_code == 0
    codes = [
        numpy_helper.to_array(onnx.load(tmp_path / name).graph.initializer[0])
        for name in ("a.onnx", "b.onnx")
    ]
    assert np.array_equal(*codes)


def test_the_links_of_a_model_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = external(blobs)
    path.rename(blobs / "aaaa")
    (blobs / "model.onnx.data").rename(blobs / "bbbb")
    (snapshot / "model.onnx").symlink_to("../../blobs/aaaa")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/bbbb")
    result = call(snapshot / "model.onnx", "--seed", 1)
    assert result.exit_code == 0, result.output
    assert (snapshot / "model.flipguard-int8.onnx").is_file()


def test_a_hard_link_is_a_file_of_its_folder(tmp_path):
    path = external(tmp_path)
    os.link(tmp_path / "model.onnx.data", tmp_path / "other")
    assert call(path).exit_code == 0


def test_outputs_replace_links_and_do_not_follow_them(tmp_path):
    (tmp_path / "in").mkdir()
    path = save(matmul(MATRIX), tmp_path / "in")
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / "in" / name).symlink_to(outside)
    assert call(path, "-o", tmp_path / "in" / "out.onnx", "--force").exit_code == 0
    assert outside.read_text() == "precious"
    assert not (tmp_path / "in" / "out.onnx").is_symlink()


def test_reports_do_not_follow_links_out_of_their_folder(tmp_path):
    (tmp_path / "in").mkdir()
    path = save(matmul(MATRIX), tmp_path / "in")
    (tmp_path / "in" / "r.json").symlink_to(tmp_path / "outside")
    message = refused(path, "--report", tmp_path / "in" / "r.json")
    assert "is a link; the report needs another name" in message
    assert not (tmp_path / "outside").exists()


def test_places_that_are_named_twice(tmp_path):
    """Readers differ in which one they take, and so in the weights that they see."""
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="offset", value="0")
    path.write_bytes(proto.SerializeToString())
    assert "tensor 'w' says twice where its data is" in refused(path)


@pytest.mark.parametrize(("size", "message"), [(8, "has its values twice"), (64, "says twice")])
def test_values_that_come_twice(tmp_path, size, message):
    """Protobuf merges what comes twice, here the tensor of an attribute; the last one counts."""
    attribute = AttributeProto(name="value", type=AttributeProto.TENSOR).SerializeToString()
    for side in (64, size):
        tensor = numpy_helper.from_array(weights((side, side)), "t")
        attribute += AttributeProto(t=tensor).SerializeToString()
    constant = onnx.NodeProto(op_type="Constant", output=["c"]).SerializeToString()
    constant += length_prefixed(5, attribute)
    proto = matmul(MATRIX)
    graph = proto.graph.SerializeToString() + length_prefixed(1, constant)
    proto.ClearField("graph")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString() + length_prefixed(7, graph))
    assert message in refused(path)


# --- the file itself


def pickled():
    return pickle.dumps({"weights": [1.0, 2.0]})


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.onnx", matmul().SerializeToString())
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"once upon a time",
        pickled(),
        zipped(),
        bytes(1000),
        b"\xff" * 1000,
        b"\x3a\xff\xff\xff\xff\x7f",  # a graph of 32 GiB that is not there
        b"\x3a\x80\x80\x80\x80\x08" + bytes(100),
        b"\x0b" * 100_000,  # groups in groups
        matmul().SerializeToString()[:-1],
        matmul().SerializeToString()[:40],
    ],
    ids=range(11),
)
def test_what_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "not an ONNX model" in refused(path)


def test_a_pipe_and_a_device_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    assert "not a regular file" in refused(tmp_path / "model.onnx")
    assert "not a regular file" in one_line(call("inspect", "/dev/zero"))


def test_a_file_beyond_what_protobuf_holds_is_not_read(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    assert "has 1099511627776 bytes; allowed: up to 2147483647" in refused(path)


def nested_by_hand(levels):
    """A model of so many graphs in one another, in bytes: no library writes that."""

    field = length_prefixed
    graph = b""
    for _ in range(levels):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(2, b"y") + field(4, b"If") + field(5, attribute))
    return b"\x08\x08" + field(7, graph) + field(8, b"\x10\x11")


def test_depth_bomb(tmp_path):
    path = tmp_path / "model.onnx"
    for levels in (1000, 100, 40):
        path.write_bytes(nested_by_hand(levels))
        assert "not an ONNX model" in refused(path)
    path.write_bytes(nested_by_hand(30))
    assert "nothing to guard" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shape(-1, 64), "has the shape [-1, 64]; allowed: sizes from 0 on"),
        (shape(64, 63), "needs 16128 bytes; found: 16384"),
        (shape(1 << 32, 1 << 32), "which no memory can hold"),
        (shape(1 << 62, 4), "which no memory can hold"),
        (emptied(0, 1 << 62), "which no memory can hold"),
        (emptied(1 << 20, 1 << 20), "needs 1099511627776 values in float_data; found: 0"),
        (emptied(64, 64), "needs 4096 values in float_data; found: 0"),
        (shape(*[1] * 40), "has 40 axes; allowed: up to 32"),
    ],
)
def test_shapes_that_the_data_does_not_fill(tmp_path, change, message):
    assert message in refused(written(changed(change), tmp_path))


def test_values_in_the_wrong_field(tmp_path):
    def both(proto):
        proto.graph.initializer[0].float_data.extend([0.0] * 4096)

    def wrong(proto):
        proto.graph.initializer[0].ClearField("raw_data")
        proto.graph.initializer[0].int64_data.extend([0] * 4096)

    def text(proto):
        proto.graph.initializer[0].data_type = TensorProto.STRING

    def unknown(proto):
        proto.graph.initializer[0].data_type = 99

    for change, message in (
        (both, "has its values in float_data and raw_data"),
        (wrong, "of FLOAT has its values in int64_data"),
        (text, "of STRING has its values in raw_data"),
        (unknown, "has the type 99, which does not exist"),
    ):
        assert message in refused(written(changed(change), tmp_path))


def test_values_that_are_there_twice_wherever_a_tensor_can_stand(tmp_path):
    """One reader takes float_data, another raw_data."""
    values = np.zeros(64, np.float32)
    double = numpy_helper.from_array(values, "double")
    double.float_data.extend([1.0] * 64)
    place = numpy_helper.from_array(np.arange(64), "place")
    sparse = onnx.SparseTensorProto(values=double, indices=place, dims=[64])
    held = AttributeProto(name="value", type=AttributeProto.TENSOR, t=double)
    several = AttributeProto(name="many", type=AttributeProto.TENSORS, tensors=[double])
    sparse_one = AttributeProto(
        name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse
    )
    inner = helper.make_graph([], "inner", [], [], [double])
    graph = AttributeProto(name="body", type=AttributeProto.GRAPH, g=inner)

    def node(attribute):
        def change(proto):
            proto.graph.node.add(op_type="Constant", output=["c"]).attribute.append(attribute)

        return change

    def function(attribute, default):
        def change(proto):
            body = proto.functions.add(name="F", domain="local", output=["c"])
            body.opset_import.add(version=17)
            body.node.add(op_type="Constant", output=["c"])
            attributes = body.attribute_proto if default else body.node[0].attribute
            attributes.append(attribute)

        return change

    attributes = held, several, sparse_one, graph
    changes = [node(each) for each in attributes]
    changes += [function(each, default) for each in attributes for default in (False, True)]
    for change in changes:
        message = refused(written(changed(change), tmp_path))
        assert "'double' of FLOAT has its values in float_data and raw_data" in message


def test_defaults_of_functions_and_references(tmp_path):
    def default(**field):
        def change(proto):
            body = proto.functions.add(name="F", domain="local", output=["c"])
            body.opset_import.add(version=17)
            body.node.add(op_type="Constant", output=["c"])
            body.attribute_proto.add(name="w", **field)

        return change

    def both(proto):
        constant = proto.graph.node.add(op_type="Constant", output=["c"])
        constant.attribute.add(
            name="value_floats", type=AttributeProto.FLOATS, floats=[1.0], ref_attr_name="w"
        )

    outside = TensorProto(name="t", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    for change, message in (
        (default(type=AttributeProto.TENSOR, t=outside), "is a graph or has external data"),
        (default(type=AttributeProto.GRAPH, g=onnx.GraphProto(name="g")), "is a graph or has"),
        (both, "refers to one of its function and holds floats; allowed: one of the two"),
    ):
        assert message in refused(written(changed(change), tmp_path))


def test_names_that_are_defined_twice(tmp_path):
    def initializer(proto):
        proto.graph.initializer.append(proto.graph.initializer[0])

    def output(proto):
        proto.graph.node.append(proto.graph.node[0])

    def function(proto):
        proto.functions.append(proto.functions[0])

    assert "value 'outer' is defined more than once" in refused(
        written(changed(initializer), tmp_path)
    )
    assert "value 'y' is defined more than once" in refused(written(changed(output), tmp_path))
    twice = changed(function, SAMPLES["function"]())
    assert "two local functions have the same name" in refused(written(twice, tmp_path))


def test_cycles(tmp_path):
    loops = model(
        [node("Identity", "b", "a"), node("Identity", "a", "b"), node("MatMul", "a w", "y")],
        {"x": (F, [64])},
        {"y": (F, [64])},
        {"w": weights(MATRIX)},
    )
    assert "depends on itself" in refused(written(loops, tmp_path))
    inside = SAMPLES["nested"]()
    inside.graph.node[0].attribute[0].g.node[0].input[0] = "y"
    assert "value 'y' of If depends on itself" in refused(written(inside, tmp_path))


def functions(calls, copies=1):
    """A model with local functions: name -> the names that it calls, each so many times."""
    bodies = []
    for name, called in calls.items():
        steps, last = [], "x"
        for number, callee in enumerate([c for c in called for _ in range(copies)]):
            steps.append(node(callee, last, f"v{number}", domain="local"))
            last = f"v{number}"
        steps.append(node("Identity", last, "y"))
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        bodies.append(helper.make_function("local", name, ["x"], ["y"], steps, imports))
    first = next(iter(calls))
    return model(
        [node(first, "x", "h", domain="local"), node("MatMul", "h w", "y")],
        {"x": (F, [2, 64])},
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX)},
        functions=bodies,
    )


def test_functions_that_call_themselves(tmp_path):
    for calls in ({"A": ["A"]}, {"A": ["B"], "B": ["A"]}):
        message = refused(written(functions(calls), tmp_path))
        assert "local functions call themselves: " in message


def test_functions_that_grow_without_bounds(tmp_path):
    names = [f"F{i}" for i in range(40)]
    calls = dict(zip(names, [[n] for n in names[1:]] + [[]], strict=True))
    message = refused(written(functions(calls, copies=2), tmp_path))
    assert "expands to" in message
    names = [f"F{i}" for i in range(1000)]
    calls = dict(zip(names, [[n] for n in names[1:]] + [[]], strict=True))
    assert "at a depth of 65; allowed" in refused(written(functions(calls), tmp_path))


def test_what_is_legal_but_not_handled(tmp_path):
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        helper.make_tensor("i", TensorProto.INT64, [1], [0]),
        [10],
    )

    def training(proto):
        proto.training_info.add()

    def sparse_initializer(proto):
        proto.graph.sparse_initializer.append(sparse)

    def sparse_inside(proto):
        proto.graph.node[0].attribute[0].g.sparse_initializer.append(sparse)

    def argument(proto):
        proto.graph.node[0].attribute[0].g.node[0].op_type = "Gemm"
        attribute = proto.graph.node[0].attribute[0].g.node[0].attribute.add(name="transB")
        attribute.type, attribute.ref_attr_name = AttributeProto.INT, "flag"

    def sparse_external(proto):
        constant = proto.graph.node.add(op_type="Constant", output=["c"])
        constant.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
        inner = constant.attribute[0].sparse_tensor
        inner.CopyFrom(sparse)
        inner.values.ClearField("raw_data")
        inner.values.data_location = TensorProto.EXTERNAL
        inner.values.external_data.add(key="location", value="/etc/passwd")

    for change, message in (
        (training, "training information is not supported"),
        (sparse_initializer, "sparse initializers are not supported"),
        (sparse_inside, "sparse initializers are not supported"),
        (argument, "takes 'transB' from an attribute of its function"),
        (sparse_external, "'sparse_value' of Constant has external data"),
    ):
        assert message in refused(written(changed(change), tmp_path))


def test_nodes_that_lack_what_is_read_of_them(tmp_path):
    def few_inputs(proto):
        del proto.graph.node[0].input[1:]

    def no_output(proto):
        del proto.graph.node[0].output[:]

    def attribute(name, **value):
        def change(proto):
            proto.graph.node[0].op_type = "Gemm"
            proto.graph.node[0].attribute.append(AttributeProto(name=name, **value))

        return change

    def disguised(proto):
        attribute("x", type=AttributeProto.INT, g=SAMPLES["nested"]().graph)(proto)

    def twice(proto):
        for _ in range(2):
            attribute("transB", type=AttributeProto.INT, i=1)(proto)

    def permuted(*axes):
        def change(proto):
            proto.graph.node.insert(0, node("Transpose", "w", "w2", perm=axes))
            proto.graph.node[1].input[1] = "w2"

        return change

    for change, message in (
        (few_inputs, "(MatMul) has 1 inputs and 1 outputs; allowed: at least 2 and 1"),
        (no_output, "(MatMul) has 2 inputs and 0 outputs"),
        (
            attribute("transB", type=AttributeProto.STRING, s=b"1"),
            "'transB' as STRING; allowed: INT",
        ),
        (attribute("alpha", type=AttributeProto.INTS, ints=[1]), "'alpha' as INTS; allowed: FLOAT"),
        (disguised, "attribute 'x' of Gemm is INT, but holds 'g'"),
        (twice, "has the attribute 'transB' more than once"),
        (permuted(0, 0), "has the perm [0, 0], no permutation"),
        (permuted(0, 7), "has the perm [0, 7], no permutation"),
    ):
        path = written(changed(change, matmul(MATRIX)), tmp_path)
        assert message in refused(path)


def test_names_that_are_not_utf_8(tmp_path):
    path = written(matmul(MATRIX), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"Mat\xff\xfe!"))
    assert "a name in it is not UTF-8" in refused(path)


def test_metadata_that_lies_changes_nothing(tmp_path):
    proto = SAMPLES["nested"]()
    for key, value in (
        ("flipguard.input_sha256", "0" * 64),
        ("flipguard.scheme", "../../etc"),
        ("flipguard.options", '{"scheme": "../../etc"}'),
        ("flipguard.block_size", "-5"),
        ("flipguard.seed", "x\x1b[2J"),
    ):
        proto.metadata_props.add(key=key, value=value)
    path = written(proto, tmp_path)
    result = call(path, "--seed", 5, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    record = {e.key: e.value for e in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert record["flipguard.seed"] == "5"
    assert record["flipguard.scheme"] == "int8"
    message = one_line(call("verify", path, path))
    assert "scheme '../../etc' is unknown" in message


def test_types_that_are_no_weights_are_left_alone(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 64])},
        {"w": weights(MATRIX), "c": np.ones((8, 8), np.complex64)},
    )
    proto.graph.initializer.append(
        helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"\xff"])
    )
    path = written(proto, tmp_path)
    assert call(path, "--no-validate", "--preserve", "off").exit_code == 0


def test_an_initializer_may_stand_beside_an_input_only_once(tmp_path):
    proto = SAMPLES["initializer_as_input"]()
    assert call(written(proto, tmp_path)).exit_code == 0
    proto.graph.input.append(proto.graph.input[-1])
    (tmp_path / "model.flipguard-int8.onnx").unlink()
    assert "value 'w' is defined more than once" in refused(written(proto, tmp_path))


@pytest.mark.parametrize(
    ("opset", "domain", "op"),
    [(99, "", "MatMul"), (17, "evil.ops", "MatMul"), (17, "", "NoSuchOp")],
)
def test_operators_that_onnxruntime_does_not_know(tmp_path, opset, domain, op):
    proto = matmul(MATRIX, opset=opset)
    proto.graph.node.append(node(op, "y w", "z", domain=domain))
    proto.graph.output.append(helper.make_tensor_value_info("z", F, ["n", 64]))
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    message = refused(written(proto, tmp_path))
    assert "model.onnx: the original cannot be run (does not load" in message
