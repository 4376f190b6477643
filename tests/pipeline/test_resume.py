"""A run that was interrupted goes on where it ended, and writes what it would have written."""

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

import flipguard_onnx
from flipguard_onnx.io import kept
from tests.helpers.command import call, one_line
from tests.helpers.decoders import decoder
from tests.helpers.samples import matmul, model, node, save, weights


def chain(dtype=np.float32, count=4):
    """MatMuls one after the other, with weights w0, w1, ..."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("MatMul", f"x{i} w{i}", f"x{i + 1}") for i in range(count)]
    matrices = {f"w{i}": 4 * weights((64, 64), i, dtype) for i in range(count)}
    ends = {name: (kind, ["n", 64]) for name in ("x0", f"x{count}")}
    first, last = ends.items()
    return model(nodes, dict([first]), dict([last]), matrices, opset=21, ir_version=10)


def guard(source, folder, scheme, resume, **options):
    output = folder / ("resumed.onnx" if resume else "once.onnx")
    if resume:
        options["resume"] = folder / "kept"
    return flipguard_onnx.guard(source, scheme, output=output, force=True, **options)


def stop(source, folder, scheme="int8", **options):
    """Somebody stops a run when it has drawn half of its weights."""

    def interrupt(stage, done, total):
        if stage == "guarding" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(source, folder, scheme, resume=True, progress=interrupt, **options)
    assert not (folder / "resumed.onnx").exists()


def written(folder, name):
    """The bytes of all models of that name."""
    return [path.read_bytes() for path in sorted(folder.glob(f"{name}*.onnx"))]


@pytest.mark.parametrize(
    ("scheme", "proto", "options"),
    [
        ("int8", chain(), {}),
        ("int4", chain(), {"emit": "both"}),
        ("nf4", chain(), {"preserve": "off"}),
        ("fp4", chain(np.float16), {}),
        ("int4", chain(ml_dtypes.bfloat16), {"emit": "float", "validate": False}),
        ("int4", chain(), {"int8_share": 0.3}),
        ("nvfp4", chain(), {"emit": "both"}),
        ("int4", decoder(), {}),
    ],
)
def test_the_result_is_that_of_a_run_that_nobody_stopped(scheme, proto, options, tmp_path):
    source = save(proto, tmp_path)
    once = guard(source, tmp_path, scheme, resume=False, seed=7, **options)
    stop(source, tmp_path, scheme, seed=7, **options)
    stop(source, tmp_path, scheme, seed=7, **options)
    resumed = guard(source, tmp_path, scheme, resume=True, seed=7, **options)
    assert resumed.tensors == once.tensors
    assert written(tmp_path, "resumed") == written(tmp_path, "once")
    assert not (tmp_path / "kept").exists()


def test_what_is_finished_is_not_drawn_again(tmp_path):
    source = save(chain(), tmp_path)
    once = guard(source, tmp_path, "int8", resume=False, seed=7)
    stop(source, tmp_path, seed=7)
    found = {path: kept.load(path) for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    drawn = {path: arrays for path, arrays in found.items() if "codes" in arrays}
    assert len(drawn) == 2
    for path, arrays in drawn.items():
        arrays["codes"] = arrays["nearest"]
        kept.store(path, arrays)
    resumed = guard(source, tmp_path, "int8", resume=True, seed=7)
    assert [tensor.flips for tensor in resumed.tensors[:2]] == [0, 0]
    assert resumed.tensors[2:] == once.tensors[2:]


def test_the_seed_is_that_of_the_run_that_was_stopped(tmp_path):
    source = save(chain(), tmp_path)
    stop(source, tmp_path)
    (path,) = (p for p in (tmp_path / "kept").rglob("*") if p.is_file() and "seeds" in kept.load(p))
    first = int(kept.load(path)["seeds"][0])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert guard(source, tmp_path, "int8", resume=True).seed == first
    assert guard(source, tmp_path, "int8", resume=True).seed != first


@pytest.mark.parametrize("change", [{"scheme": "int4"}, {"seed": 8}, {"preserve": "off"}])
def test_another_run_starts_anew_and_leaves_the_first_alone(change, tmp_path):
    source = save(chain(), tmp_path)
    stop(source, tmp_path, seed=7)
    before = sorted((tmp_path / "kept").rglob("*"))
    options = {"scheme": "int8", "seed": 7} | change
    once = guard(source, tmp_path, resume=False, **options)
    assert guard(source, tmp_path, resume=True, **options).tensors == once.tensors
    assert sorted((tmp_path / "kept").rglob("*")) == before


def test_another_model_starts_anew(tmp_path):
    stop(save(chain(), tmp_path), tmp_path, seed=7)
    source = save(chain(count=5), tmp_path)
    once = guard(source, tmp_path, "int8", resume=False, seed=7)
    assert guard(source, tmp_path, "int8", resume=True, seed=7).tensors == once.tensors


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing that numpy could read"])
def test_a_file_that_cannot_be_read_is_made_again(content, tmp_path):
    source = save(chain(), tmp_path)
    once = guard(source, tmp_path, "int8", resume=False, seed=7)
    stop(source, tmp_path, seed=7)
    for path in (tmp_path / "kept").rglob("*"):
        if path.is_file():
            path.write_bytes(content)
    assert guard(source, tmp_path, "int8", resume=True, seed=7).tensors == once.tensors


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    source = save(matmul(), tmp_path)
    (tmp_path / "file").touch()
    line = one_line(call(source, "--resume", tmp_path / "file"))
    assert line.endswith("file: resume: the folder cannot be made (Not a directory)\n")
