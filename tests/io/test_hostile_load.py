"""Time and memory are bounded by what a file holds, whatever it says."""

import io
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from flipguard_onnx import runtime
from tests.helpers.command import call
from tests.helpers.hostile import MATRIX, emptied, inside_a_loop, one_line, refused, written
from tests.helpers.samples import SAMPLES, F, matmul, model, node, save, weights

ROOT = Path(__file__).parents[2]


def run(*arguments, memory=None, prefix=(), **environment):
    """The command in a process of its own, with so many bytes of memory."""

    def limit():
        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    return subprocess.run(
        [*prefix, sys.executable, "-m", "flipguard_onnx", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        preexec_fn=limit,
        timeout=300,
        check=False,
    )


def test_a_small_file_that_claims_terabytes_is_refused_at_once(tmp_path):
    proto = SAMPLES["nested"]()
    emptied(1 << 21, 1 << 20)(proto)
    path = written(proto, tmp_path)
    result = run("inspect", path, memory=1 << 30)
    assert result.returncode == 2
    assert "needs 2199023255552 values in float_data; found: 0" in result.stderr


@pytest.mark.parametrize("dims", [[1 << 20, 1 << 20, 64], [1 << 40, 64], [1 << 31, 64]])
def test_inputs_that_no_memory_holds_are_not_made_up(tmp_path, dims):
    proto = model(
        [node("MatMul", "x w", "y")], {"x": (F, dims)}, {"y": (F, None)}, {"w": weights(MATRIX)}
    )
    message = refused(written(proto, tmp_path))
    assert "the original does not run on made-up inputs (none takes less than 1024 MiB)" in message


def test_a_model_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.shared_child, "limits", runtime.Limits(seconds=3))
    started = time.monotonic()
    message = refused(written(inside_a_loop(1 << 62), tmp_path))
    assert message.endswith(
        "model.onnx: the original cannot be run (takes longer than 3 s; stopped); "
        "go without inputs (--no-validate)"
    )
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("folded", [True, False])
def test_a_model_that_asks_for_all_memory_does_not_get_it(tmp_path, folded):
    """A ConstantOfShape, folded when the model is loaded or run with it."""
    size = np.array([1 << 20, 1 << 15], np.int64)
    proto = model(
        [
            *([] if folded else [node("Cast", "n", "size", to=TensorProto.INT64)]),
            node("ConstantOfShape", "size", "many"),
            node("ReduceSum", "many", "sum", keepdims=0),
            node("MatMul", "x w", "h"),
            node("Add", "h sum", "y"),
        ],
        {"x": (F, [2, 64])} | ({} if folded else {"n": (F, [2])}),
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX)} | ({"size": size} if folded else {}),
    )
    path = written(proto, tmp_path)
    if folded:
        message = refused(path)
        assert "the original does not run on made-up inputs (" in message
        assert "Failed to allocate memory" in message
        return
    np.savez(tmp_path / "d.npz", x=np.ones((2, 64), np.float32), n=np.float32([1 << 20, 1 << 15]))
    message = refused(path, "--data", tmp_path / "d.npz")
    assert "model.onnx: the original does not run on the inputs of --data (" in message
    assert "Failed to allocate memory" in message


def chain(op, length, width=1):
    """A weight behind a chain of nodes, each of which reads the one before `width` times."""
    steps = [node(op, " ".join([f"w{i}"] * width), f"w{i + 1}", axis=0) for i in range(length)]
    if op == "Identity":
        for step in steps:
            del step.attribute[:]
    return model(
        [*steps, node("MatMul", f"x w{length}", "y")],
        {"x": (F, [2, 64])},
        {"y": (F, [2, None])},
        {"w0": weights(MATRIX)},
    )


@pytest.mark.parametrize(("op", "length", "width"), [("Identity", 5000, 1), ("Concat", 60, 2)])
def test_graphs_are_walked_in_a_time_that_grows_with_them(tmp_path, op, length, width):
    """Neither the depth of a chain nor the number of its paths, here 2 ** 60, counts."""
    path = written(chain(op, length, width), tmp_path)
    result = run("inspect", path)
    assert result.returncode == 0, result.stderr
    assert "w0" in result.stdout


def test_a_long_chain_is_guarded(tmp_path):
    path = written(chain("Identity", 3000), tmp_path)
    result = call(path, "--preserve", "off", "--no-validate")
    assert result.exit_code == 0, result.output


def npz(folder, name="x", content=None, **arrays):
    path = folder / "data.npz"
    if content is None:
        np.savez_compressed(path, **arrays)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}.npy", content)
    return path


def header(shape, dtype="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable .npz file"),
        (b"once upon a time", "not a readable .npz file"),
        (header((1 << 40, 64)) + bytes(100), "an array claims the shape (1099511627776, 64)"),
        (header((-1, 64)) + bytes(100), "an array claims the shape (-1, 64)"),
        (header((1 << 62, 1 << 62, 0)) + bytes(100), "not a readable .npz file"),
        (header((1,), "|O") + bytes(100), "not a readable .npz file"),
        (header((2, 64), "<U8") + bytes(4096), "given as <U8 (2, 64); allowed: float32"),
        (header((2, 63)) + bytes(504), "given as float32 (2, 63); allowed: float32"),
        (header((0, 2, 64)), "holds no feeds"),
    ],
)
def test_inputs_that_are_no_inputs(tmp_path, content, message):
    path = written(matmul(MATRIX), tmp_path)
    proto_fixed = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, [2, 64])},
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX)},
    )
    path.write_bytes(proto_fixed.SerializeToString())
    data = npz(tmp_path, content=content)
    assert message in refused(path, "--data", data)


def test_a_pickle_is_not_opened(tmp_path):
    path = written(matmul(MATRIX), tmp_path)
    data = tmp_path / "data.npz"
    data.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "not a readable .npz file" in refused(path, "--data", data)
    np.savez(data, x=np.array([{"a": 1}], object))
    assert "not a readable .npz file" in refused(path, "--data", data)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = written(matmul(MATRIX), tmp_path)
    data = tmp_path / "data.npz"
    with (
        zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(header((1 << 20, 1024)))
        for _ in range(4096 // 64 + 1):
            stream.write(bytes(64 << 20))
    message = refused(path, "--data", data)
    assert "allowed: up to 4294967296" in message


def test_inputs_of_other_kinds(tmp_path):
    path = written(matmul(MATRIX), tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        assert "not a regular file, or not there" in refused(path, "--data", tmp_path / name)
    assert "a folder without .npz files" in refused(path, "--data", tmp_path / "folder")
    assert "no array for input 'x'; found ['y']" in refused(
        path, "--data", npz(tmp_path, y=np.ones(3))
    )


def test_strings_as_inputs_are_refused(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.STRING, [1]))
    assert "input 's' holds strings; allowed: tensors of real" in refused(written(proto, tmp_path))


@pytest.mark.parametrize("name", ["sr", "length", "position", "ids"])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8])
def test_integers_too_small_for_what_their_names_promise(tmp_path, name, kind):
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("Cast", name, "n", to=F),
            node("ReduceSum", "n", "s", keepdims=0),
            node("Add", "h s", "y"),
        ],
        {"x": (F, [2, 64]), name: (kind, [1, "open"])},
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX)},
    )
    result = call(written(proto, tmp_path))
    assert result.exit_code == 0, result.output


# --- no network, no code from outside


def test_the_whole_flow_without_a_network(tmp_path):
    """In a network namespace of its own, without an interface that is up."""
    prefix = ("unshare", "--net", "--map-root-user")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here")
    path = save(matmul(MATRIX), tmp_path)
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    result = run(path, "-o", out, "--report", report, prefix=prefix)
    assert result.returncode == 0, result.stderr
    assert run("inspect", path, prefix=prefix).returncode == 0
    assert run("verify", path, out, prefix=prefix).returncode == 0


def test_no_socket_is_opened(tmp_path):
    trace = tmp_path / "trace"
    prefix = (
        "strace",
        "-f",
        "-qq",
        "-e",
        "signal=none",
        "-e",
        "trace=socket,connect,bind,sendto",
        "-o",
        str(trace),
    )
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("strace cannot be used here")
    (tmp_path / "in").mkdir()
    path = save(matmul(MATRIX), tmp_path / "in")
    result = run(path, prefix=prefix)
    assert result.returncode == 0, result.stderr
    assert trace.read_text() == ""


def test_no_library_is_loaded_from_where_the_model_lies(tmp_path):
    """Modules in the working directory are not imported, not by the child either."""
    for name in ("onnx", "onnxruntime", "numpy", "resource", "flipguard_onnx"):
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w')\n")
    path = save(matmul(MATRIX), tmp_path)
    start = "from flipguard_onnx.__main__ import run; run()"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {start}"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, str(path)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "pwned").exists()


def test_no_custom_operators_are_registered():
    package = ROOT / "flipguard_onnx"
    assert "register_custom_ops" not in "".join(p.read_text() for p in package.rglob("*.py"))


# --- names are data

ESCAPES = "\x1b]0;pwned\x07\x1b[2J\nflipguard-onnx: all is well\r\u202eevil\u2028<script>\x9b31m"


def test_names_reach_the_terminal_as_text(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = ESCAPES
    proto.graph.initializer.append(
        numpy_helper.from_array(np.ones((8, 8, 8), np.float32), f"{ESCAPES}2")
    )
    proto.graph.node.append(node("Reshape\x1b[1m", "y", "z", domain="x\n"))
    proto.graph.node[-1].input.append(f"{ESCAPES}2")
    path = tmp_path / "a\x1b[7mb.onnx"
    path.write_bytes(proto.SerializeToString())
    for arguments in (("inspect", path), (path, "--no-validate", "--preserve", "off")):
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        assert all(line.isprintable() for line in result.output.split("\n"))
    assert "\\x1b]0;pwned\\x07" in call("inspect", path).stdout
    message = one_line(call(path, "--scheme", "int4", "--int8", f"{ESCAPES}3", "--force"))
    assert "\\x1b]0;pwned" in message


def test_a_name_of_a_megabyte_is_cut(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "w" * (1 << 20)
    result = call("inspect", written(proto, tmp_path))
    assert result.exit_code == 0
    assert len(result.stdout) < 2000
    assert "w…" in result.stdout


def test_a_name_in_an_error_of_onnxruntime(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.node[0].op_type = "MatMul"
    proto.graph.node.append(node("NoSuchOp", "y", "z", name=ESCAPES))
    message = refused(written(proto, tmp_path))
    assert "model.onnx: the original cannot be run (does not load: " in message
    assert repr(ESCAPES)[1:9] in message
