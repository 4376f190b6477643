"""Made-up inputs fit the graph's signature; drift is measured as it says."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from flipguard_onnx.calibration.inputs import (
    BATCH,
    FEEDS,
    FEWER_FEEDS,
    LARGE,
    Input,
    load_feeds,
    made_up_feeds,
    samples_at_a_time,
)
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.errors import DriftError, ModelError, OptionError, ValidationError
from flipguard_onnx.io.model import open_model
from flipguard_onnx.reports.validation import Drift, pooled
from flipguard_onnx.validation.drift import drifts, judge
from flipguard_onnx.validation.validator import ModelRunner
from tests.helpers.samples import F, model, node, save, weights


def signature(**inputs):
    """A model with these inputs; `ids` and `ids32` index tables of 50 and 20 (float16) rows."""
    return model(
        [
            node("Gather", "table ids", "a"),
            node("Cast", "ids32", "i", to=TensorProto.INT64),
            node("Cast", "small", "small.float", to=TensorProto.FLOAT),
            node("Gather", "small.float i", "b"),
        ],
        inputs,
        {"a": (F, None)},
        {"table": weights((50, 4)), "small": weights((20, 4)).astype(np.float16)},
    )


def test_values_follow_types_and_names():
    int64 = TensorProto.INT64
    proto = signature(
        ids=(int64, ["batch", "sequence"]),
        ids32=(TensorProto.INT32, ["batch", "sequence"]),
        attention_mask=(int64, ["batch", "sequence"]),
        keep=(TensorProto.BOOL, ["batch", "sequence"]),
        position_ids=(int64, ["batch", "sequence"]),
        token_type_ids=(int64, ["batch", "sequence"]),
        length=(int64, ["batch"]),
        sr=(int64, []),
        signal=(TensorProto.FLOAT16, ["batch", 3, "sequence"]),
    )
    feeds = next(made_up_feeds(proto, 0))
    assert len(feeds) == FEEDS
    for feed in feeds:
        assert feed["ids"].shape == (1, 64)
        assert 20 < feed["ids"].max() < 50
        assert feed["ids32"].dtype == np.int32
        assert feed["ids32"].max() < 20
        assert feed["attention_mask"].min() == feed["attention_mask"].max() == 1
        assert feed["keep"].all()
        assert np.array_equal(feed["position_ids"][0], np.arange(64))
        assert not feed["token_type_ids"].any()
        assert feed["length"].tolist() == [64]
        assert feed["sr"] == 16000
        assert feed["signal"].shape == (1, 3, 64)
        assert feed["signal"].dtype == np.float16
    assert not np.array_equal(feeds[0]["ids"], feeds[1]["ids"])
    assert len(next(made_up_feeds(proto, LARGE))) == FEWER_FEEDS


def test_open_dimensions_are_tried_until_the_model_runs(tmp_path):
    """The reshape runs only when the product of two open dimensions is 16 * 1."""
    proto = model(
        [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")],
        {"x": (F, [1, "a", "b"])},
        {"y": (F, ["n", 16])},
        {"w": weights((16, 16)), "shape": np.array([1, 16], np.int64)},
    )
    runner = ModelRunner(Samples(open_model(save(proto, tmp_path)), None))
    assert runner.feeds[0]["x"].shape in ((1, 16, 1), (1, 1, 16))


@pytest.mark.parametrize("given", [["n", "channels", "height", "width"], None])
def test_an_image_gets_the_channels_of_the_kernel(tmp_path, given):
    """Also where it is converted, shifted and scaled first, as exporters leave it to the graph."""
    nodes = [
        node("Cast", "x", "x.float", to=F),
        node("Sub", "x.float mean", "shifted"),
        node("Conv", "shifted w", "y", kernel_shape=[3, 3], group=2),
    ]
    constants = {"w": weights((8, 3, 3, 3)), "mean": np.ones((1, 6, 1, 1), np.float32)}
    proto = model(nodes, {"x": (TensorProto.FLOAT16, given)}, {"y": (F, None)}, constants)
    runner = ModelRunner(Samples(open_model(save(proto, tmp_path)), None))
    assert {feed["x"].shape[1] for feed in runner.feeds} == {6}


def test_a_model_that_never_runs_is_named(tmp_path):
    proto = model(
        [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")],
        {"x": (F, [1, "a"])},
        {"y": (F, ["n", 16])},
        {"w": weights((7919, 16)), "shape": np.array([1, 7919], np.int64)},
    )
    with pytest.raises(OptionError, match="the original does not run on made-up inputs"):
        ModelRunner(Samples(open_model(save(proto, tmp_path)), None))


def test_drift_by_hand():
    wanted = np.array([[3.0, 4.0]], np.float32)
    found = np.array([[3.0, 4.5]], np.float32)
    (drift,) = drifts(["y"], [[wanted]], [[found]])
    assert drift.values == 2
    assert drift.relative_l2 == pytest.approx(0.1)
    assert drift.sqnr_db == pytest.approx(20.0)
    assert drift.max_abs == 0.5
    assert drift.cosine == pytest.approx(27 / (5 * np.hypot(3, 4.5)))
    assert drift.top1 == 1.0
    (integers,) = drifts(["n"], [[np.array([1, 2, 3, 4])]], [[np.array([1, 2, 3, 5])]])
    assert (integers.top1, integers.relative_l2) == (0.75, 0.5)


def drift_of(relative, values=10_000):
    return Drift("y", values, 1.0, 0.0, relative, 0.0, None)


def test_the_bound_is_a_multiple_of_plains_drift():
    judge([drift_of(0.1)], [drift_of(0.32)], max_drift=3)  # 3 * (1 + 8 / 100) = 3.24
    with pytest.raises(DriftError, match=r"0\.3300 .* allowed: 0\.3240: 3\.24 times nearest"):
        judge([drift_of(0.1)], [drift_of(0.33)], max_drift=3)
    with pytest.raises(DriftError, match="drift by nan"):
        judge([drift_of(0.1)], [drift_of(float("nan"))], max_drift=3)
    judge([drift_of(0.0)], [drift_of(0.003)], max_drift=3)
    with pytest.raises(DriftError, match=r"0\.0100 .* allowed: 0\.0032: 3\.24 times nearest"):
        judge([drift_of(0.0)], [drift_of(0.01)], max_drift=3)


def test_outputs_are_pooled_by_their_sizes():
    assert pooled([drift_of(0.3, 100), drift_of(0.4, 100)]) == pytest.approx(np.sqrt(0.125))
    assert pooled([drift_of(0.1, 9999), drift_of(5.0, 1)]) == pytest.approx(0.1118, abs=1e-4)


def test_other_outputs_are_refused(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, [2, 16])},
        {"y": (F, [2, 16])},
        {"w": weights((16, 16))},
    )
    runner = ModelRunner(Samples(open_model(save(proto, tmp_path)), None))
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    other.graph.node[0].output[0] = other.graph.output[0].name = "z"
    with pytest.raises(ValidationError, match=r"outputs are \['z'\]; allowed: \['y'\]"):
        runner.drift(save(other, tmp_path, "other.onnx"), exact=True)
    proto.graph.initializer[0].raw_data = np.full((16, 16), np.inf, np.float32).tobytes()
    with pytest.raises(ValidationError, match="'y' holds NaN or infinity"):
        runner.drift(save(proto, tmp_path, "inf.onnx"), exact=True)


def test_a_dimension_of_zero_is_made_up_as_it_is(tmp_path):
    """onnxruntime takes no other; a cache before the first token has it."""
    proto = model(
        [node("Concat", "past x", "h", axis=1), node("MatMul", "h w", "y")],
        {"x": (F, [1, "n", 8]), "past": (F, [1, 0, 8])},
        {"y": (F, None)},
        {"w": weights((8, 16))},
    )
    found = Samples(open_model(save(proto, tmp_path)), None).require()
    assert {feed["past"].shape for feed in found.feeds} == {(1, 0, 8)}
    assert all(feed["x"].size for feed in found.feeds)


def test_long_texts_run_one_by_one():
    """Attention takes memory that grows with the square of their length."""
    inputs = [Input("ids", np.dtype(np.int64), (BATCH, "length"), 100)]

    def at_a_time(length):
        return samples_at_a_time({"ids": np.zeros((16, length), np.int64)}, inputs)

    assert [at_a_time(length) for length in (64, 512, 1024, 9000)] == [16, 16, 4, 1]


@pytest.mark.parametrize("wrong", [0.5, np.nan, 2.0**63])
def test_numbers_that_are_no_integers_are_refused(tmp_path, wrong):
    proto = model([node("Gather", "table ids", "y")], {"ids": (TensorProto.INT64, ["n"])},
                  {"y": (F, None)}, {"table": weights((9, 4))})  # fmt: skip
    ids = np.array([1.0, wrong])
    np.savez(tmp_path / "ids.npz", ids=ids)
    with pytest.raises(ModelError, match=re.escape(f"'ids' holds {ids[1]}; allowed: values of")):
        load_feeds(tmp_path / "ids.npz", proto)
    np.savez(tmp_path / "ids.npz", ids=np.array([1.0, 2.0]))
    assert load_feeds(tmp_path / "ids.npz", proto)[0]["ids"].tolist() == [1, 2]


def test_data_without_samples_are_refused(tmp_path):
    """One empty array among others may be a cache."""
    shapes = {"x": (F, ["b", 16]), "past": (F, ["b", "p", 16])}
    proto = model(
        [node("MatMul", "x w", "y"), node("MatMul", "past w", "present")],
        shapes,
        {"y": (F, ["b", 16]), "present": (F, ["b", "p", 16])},
        {"w": weights((16, 16))},
    )
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((0, 16), np.float32), past=np.zeros((0, 2, 16), np.float32))
    with pytest.raises(ModelError) as refusal:
        load_feeds(path, proto)
    message = f"{path}: holds no samples: input 'x' is given with shape (0, 16)"
    assert str(refusal.value) == message
    np.savez(path, x=np.zeros((1, 16), np.float32), past=np.zeros((1, 0, 16), np.float32))
    (feed,) = load_feeds(path, proto)
    assert feed["past"].shape == (1, 0, 16)
