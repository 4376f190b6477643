"""Do the boxes in the other coordinates keep what they promise? Needs torch."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from flipguard_onnx.quantization.error_feedback import InputMoments, draw_with_feedback
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.kernels.protocol import RandomDraw
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks
from tools.attacks import quantizers
from tools.attacks.gptq_aware import Cells
from tools.attacks.simulate import NEAREST

ROWS, COLUMNS = 24, 128


@pytest.mark.parametrize(("name", "least"), [("int4", 0.85), ("nf4", 0.98), ("int8", 0.98)])
def test_feedback_gives_the_codes_that_were_wished(name, least):
    rng = np.random.default_rng(0)
    malicious = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    cells = Cells.of(malicious, quantizers.SCHEMES[name])
    inputs = rng.standard_normal((400, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))
    known = InputMoments(
        (range(COLUMNS),), ((inputs.T @ inputs)[None],), inputs[None].astype(np.float32)
    )
    ((orders, factors),) = known.factors
    elsewhere = malicious + 0.3 * rng.standard_normal(malicious.shape).astype(np.float32)
    elsewhere = np.where(cells.frozen, malicious, elsewhere)
    settled = cells.settled(elsewhere, orders[0], factors[0].astype(np.float64))

    scheme, weights = SCHEMES[name], settled.astype(np.float32).ravel()
    size = scheme.block_size or COLUMNS
    grid = scheme.fit(weights, Blocks(ROWS, COLUMNS, size), weights.dtype, get_backend("cpu"))
    random = RandomDraw(np.uint64(1), np.uint64(0), np.float32((1 - NEAREST) / 2))
    codes = draw_with_feedback(weights, grid, known, random, get_backend("cpu"))
    wished = grid.encode(malicious.ravel(), get_backend("cpu"))
    # The others would have to exceed `top`. At int4 the guard's feedback, unlike GPTQ's, also asks
    # no weight for more than its distance from the end of the grid.
    assert (codes == wished).mean() > least
    assert (grid.encode(weights, get_backend("cpu")) == wished).mean() < 0.95
