"""Models are opened without their data and written without holding it; changes are noticed."""

import os

import numpy as np
import onnx
import pytest

import flipguard_onnx
from flipguard_onnx import ModelError
from flipguard_onnx.graph.traversal import tensors
from flipguard_onnx.io.model import DETACH_BYTES, open_model
from flipguard_onnx.io.writer import Output
from flipguard_onnx.quantization.arrays import contiguous
from tests.helpers.hostile import length_prefixed
from tests.helpers.samples import SAMPLES, matmul, save, weights


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_opened_and_saved_is_the_same(tmp_path, sample, external):
    proto = SAMPLES[sample]()
    source = open_model(save(proto, tmp_path))
    output = Output(tmp_path / "out", tmp_path / "out.onnx", external)
    output.save(source.proto, source)
    written = onnx.load(output.path)
    for tensor in tensors(written):
        tensor.ClearField("data_location")  # onnx.load says of loaded data that it is not external
    assert written == proto
    assert source.size == (tmp_path / "model.onnx").stat().st_size


def test_no_large_tensor_is_in_the_opened_proto(tmp_path):
    for sample in SAMPLES:
        source = open_model(save(SAMPLES[sample](), tmp_path))
        assert all(len(tensor.raw_data) < DETACH_BYTES for tensor in tensors(source.proto))
        assert source.payloads, sample


def test_values_in_typed_fields_stay(tmp_path):
    proto = matmul()
    tensor = proto.graph.initializer[0]
    values = weights((70, 33))
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values.reshape(-1).tolist())
    source = open_model(save(proto, tmp_path))
    assert np.array_equal(source.array(source.proto.graph.initializer[0]), values)


def test_data_given_twice_is_left_to_protobuf(tmp_path):
    """The last one counts, as it does for every reader of the file."""
    path = tmp_path / "model.onnx"
    first, last = matmul(), matmul()
    last.graph.initializer[0].raw_data = weights((70, 33), 5).tobytes()
    tensor = first.graph.initializer[0].SerializeToString()
    again = onnx.TensorProto(raw_data=last.graph.initializer[0].raw_data).SerializeToString()
    whole = first.SerializeToString()
    graph = first.graph.SerializeToString()
    both = length_prefixed(5, tensor + again)
    merged = graph.replace(length_prefixed(5, tensor), both)
    path.write_bytes(whole.replace(length_prefixed(7, graph), length_prefixed(7, merged)))
    source = open_model(path)
    (found,) = source.proto.graph.initializer
    assert np.array_equal(source.array(found), weights((70, 33), 5))


@pytest.mark.parametrize("cut", [1, 100, 5000, 9000])
def test_a_file_that_is_cut_off_is_no_model(tmp_path, cut):
    path = save(matmul(), tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError, match="its protobuf does not parse"):
        open_model(path)


def test_a_tensor_of_another_length_than_its_shape_is_refused(tmp_path):
    proto = matmul()
    proto.graph.initializer[0].dims[0] = 71
    with pytest.raises(ModelError, match="needs 9372 bytes; found: 9240"):
        open_model(save(proto, tmp_path))


@pytest.mark.parametrize("external", [False, True])
def test_an_input_that_changes_meanwhile_stops_the_run(tmp_path, external):
    source = save(matmul(), tmp_path, external=external)
    changed = tmp_path / ("model.onnx.data" if external else "model.onnx")

    def change(stage, done, total):
        if stage == "validating" and done == 0:
            content = bytearray(changed.read_bytes())
            content[-1] ^= 1
            changed.write_bytes(content)

    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match=f"{changed.name}: changed while it was being guarded"):
        flipguard_onnx.guard(source, seed=1, progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_that_is_only_touched_has_not_changed(tmp_path):
    source = save(matmul(), tmp_path)
    opened = open_model(source)
    os.utime(source, (1, 1))
    opened.require_unchanged()
    source.unlink()
    with pytest.raises(ModelError, match="changed while"):
        opened.require_unchanged()


@pytest.mark.parametrize("perm", [(1, 0), (0, 2, 1), (2, 0, 1), (3, 1, 2, 0)])
def test_a_copy_in_strips_is_a_copy(perm):
    values = np.random.default_rng(0).standard_normal((600, 3, 300, 2)[: len(perm)])
    turned = values.transpose(perm)
    assert np.array_equal(contiguous(turned), turned)
    assert contiguous(turned).flags.c_contiguous
