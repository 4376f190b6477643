"""Unusual graphs, guarded: what is written is right, or it is one line and nothing is written."""

import numpy as np
import onnx
import pytest

import flipguard_onnx
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.io.model import open_model
from tests.helpers import odd_graphs
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import save
from tests.test_runtimes import exact, openvino, reference

GUARDED = {  # the graph, and the names of all its weights
    odd_graphs.function_in_if_in_loop: {"w", "u__1"},
    odd_graphs.table_read_three_ways: {"w"},
    odd_graphs.subnormal_scales: {"w"},
    odd_graphs.shared_with_a_branch: {"w"},
    odd_graphs.only_functions: {"v__1", "w__2", "w__3"},
    odd_graphs.scan_twice: {"stack", "w"},
    odd_graphs.experts: {"a", "b", "c"},
    odd_graphs.lstm_with_everything: {"w", "r"},
    odd_graphs.conv_of_a_reshaped_constant: {"w"},
    odd_graphs.grouped_conv_transpose: {"w"},
    odd_graphs.depthwise: {"u"},
    odd_graphs.constant_on_the_left: {"stack"},
    odd_graphs.gemms: {"w", "v", "u", "t"},
    odd_graphs.old_opset: {"w", "v"},
    odd_graphs.weights_as_outputs: {"w", "v"},
    odd_graphs.odd_names: odd_graphs.ODD_NAMES,
    odd_graphs.nothing_in_it: {"w"},
    odd_graphs.missing_inputs: {"w", "u", "v", "t"},
    odd_graphs.two_layouts_in_branches: {"w", "k"},
    odd_graphs.sequence_map: {"w", "v"},
    odd_graphs.loop_that_never_runs: {"w", "v", "u"},
    odd_graphs.unsorted: {"w", "v"},
}
# what a runtime does not take in any file: a Scan whose body reads what a node outside computes
LACKING = {(odd_graphs.scan_twice, openvino)}

# graphs with biases, other small constants and weights that nothing reads, which stay float
PARTLY = {
    odd_graphs.subnormal_scales,
    odd_graphs.lstm_with_everything,
    odd_graphs.grouped_conv_transpose,
    odd_graphs.depthwise,
    odd_graphs.constant_on_the_left,
    odd_graphs.gemms,
    odd_graphs.old_opset,
    odd_graphs.weights_as_outputs,
    odd_graphs.missing_inputs,
}

REFUSED = {  # the graph, and what the one line says
    odd_graphs.functions_with_defaults: "takes 'alpha' from an attribute of its function",
    odd_graphs.double: "tensor 'w': unsupported type DOUBLE",
    odd_graphs.quantized_beside_float: "already quantized: 1,024 weights are integers",
    odd_graphs.sparse: "sparse initializers are not supported",
    odd_graphs.words: r"input 'word' holds strings",
}


def relative(found, wanted):
    """The largest relative distance of an output from that wanted."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(found, wanted, strict=True)]
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs)


def agrees(run, path, feed, wanted, bound=1e-3):
    """Whether another runtime runs a file and computes what onnxruntime does."""
    try:
        return relative(run(path, feed), wanted) < bound
    except Exception:  # each runtime has its own
        return False


@pytest.mark.parametrize("make", GUARDED, ids=lambda make: make.__name__)
def test_what_is_written_computes_what_the_original_does(tmp_path, make):
    source = save(make(), tmp_path)
    content = source.read_bytes()
    feed = Samples(open_model(source), None).require().feeds[0]
    wanted = exact(source, feed)
    half = wanted[0].dtype == np.float16  # in which the scales are rounded
    bound = 5e-3 if half else 1e-3
    others = [run for run in (reference, openvino) if agrees(run, source, feed, wanted)]
    for scheme in ("int8", "int4"):
        path = tmp_path / f"{scheme}.onnx"
        report = flipguard_onnx.guard(source, scheme, seed=1, preserve="off", output=path)
        assert GUARDED[make] == {tensor.name for tensor in report.tensors}
        assert report.coverage == 1 or make in PARTLY
        assert relative(exact(path, feed), wanted) < (bound if half else 1e-5)
        for run in others:
            old = run is reference and onnx.load(path).opset_import[0].version < 19
            if not old and (make, run) not in LACKING:
                assert agrees(run, path, feed, wanted, bound), run.__name__
        assert flipguard_onnx.verify(source, path).validation
    assert source.read_bytes() == content


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_cannot_be_guarded_is_refused_in_one_line(tmp_path, make, scheme):
    source = save(make(), tmp_path)
    content = source.read_bytes()
    line = one_line(
        call("guard", source, "--scheme", scheme, "--quiet", "-o", tmp_path / "out.onnx")
    )
    assert REFUSED[make] in line
    assert names(tmp_path) == ["model.onnx"]
    assert source.read_bytes() == content


def test_data_at_odd_places_of_a_file_below(tmp_path):
    source = odd_graphs.external(tmp_path)
    data = (tmp_path / "data" / "w.bin").read_bytes()
    flipguard_onnx.guard(source, seed=1, preserve="off", output=tmp_path / "out.onnx")
    x = {"x": np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)}
    assert relative(exact(tmp_path / "out.onnx", x), exact(source, x)) < 1e-5
    assert (tmp_path / "data" / "w.bin").read_bytes() == data


def test_biases_that_were_multiplied_out_are_counted_once(tmp_path):
    """Integer activations: onnxruntime's quantizer gets beta * C in the place of C."""
    source = save(odd_graphs.gemms(), tmp_path)
    plain = flipguard_onnx.inspect(source)
    report = flipguard_onnx.guard(
        source, activations="uint8", seed=1, preserve="off", output=tmp_path / "out.onnx"
    )
    assert {tensor.name for tensor in report.tensors} == {"w", "v", "u", "t"}
    assert sum(t.size for t in report.skipped) == sum(t.size for t in plain.skipped)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_for_one_model_is_refused(tmp_path, exists):
    source = save(odd_graphs.bare(), tmp_path)
    (tmp_path / "out").mkdir()
    place = f"{tmp_path}/{'out' if exists else 'new.onnx'}/"
    line = one_line(call("guard", source, "--quiet", "-o", place))
    assert f"{place}: the output of one model is a file, not a folder" in line
    assert names(tmp_path) == ["model.onnx", "out"]


def test_integers_for_an_old_model_whose_constants_are_inputs(tmp_path):
    source, path = save(odd_graphs.old_opset(), tmp_path), tmp_path / "out.onnx"
    report = flipguard_onnx.guard(source, activations="uint8", seed=1, preserve="off", output=path)
    assert {tensor.name for tensor in report.tensors} == {"w", "v"}
    feed = {"x": np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)}
    assert relative(exact(path, feed), exact(source, feed)) < 0.05
