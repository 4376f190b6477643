"""What tools.latency times is what it says."""

import numpy as np
import onnxruntime
import pytest

from tools.latency import EMBEDDINGS, FLOAT, embedding


def looked_up(form, folder, indices):
    path = folder / "embedding.onnx"
    embedding(form, (10, 64), path)
    [rows] = onnxruntime.InferenceSession(path).run(None, {"i": indices})
    return rows


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_all_forms_of_an_embedding_yield_the_same_rows(tmp_path, scheme):
    indices = np.array([[9, 0, 9]])
    forms = [form for form in EMBEDDINGS if form.startswith(scheme)]
    first, *others = [looked_up(form, tmp_path, indices) for form in forms]
    assert first.shape == (1, 3, 64)
    assert np.ptp(first) > 1
    assert len(others) >= 2
    for rows in others:
        np.testing.assert_allclose(rows, first, rtol=1e-6)
    if scheme == "int8":
        np.testing.assert_allclose(looked_up(FLOAT, tmp_path, indices), first, rtol=1e-6)
