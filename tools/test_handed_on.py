"""The quantizers on small layers, and the whole on one attacked model."""

import json

import numpy as np
import pytest

from tools import handed_on
from tools.handed_on import GIVEN, INT4, QUANTIZERS, main


def layer():
    """Rows [outputs, inputs], and the moments of inputs of unequal sizes that vary together."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((24, 64)).astype(np.float32)
    x = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 64)) * np.geomspace(0.1, 10, 64)
    return rows, x.T @ x / len(x)


def lost(rows, found, moments):
    return np.sum(((found - rows) @ moments) * (found - rows))


@pytest.mark.parametrize("name", ["gptq", "gptq-ort", "awq"])
def test_those_that_see_inputs_preserve_the_products_better(name):
    rows, moments = layer()
    found = QUANTIZERS[name](rows, moments.copy(), np.random.default_rng(0))
    assert lost(rows, found, moments) < 0.9 * lost(rows, INT4.quantize(rows), moments)


def test_gptq_of_inputs_that_do_not_vary_together_rounds_to_nearest():
    rows, _ = layer()
    found = QUANTIZERS["gptq"](rows, np.eye(64), np.random.default_rng(0))
    assert np.allclose(found, INT4.quantize(rows))


def test_a_rotation_changes_the_errors_and_not_their_size():
    rows, moments = layer()
    found = QUANTIZERS["rotation"](rows, moments, np.random.default_rng(0))
    sizes = [np.linalg.norm(each - rows) for each in (found, INT4.quantize(rows))]
    assert 0.8 < sizes[0] / sizes[1] < 1.2
    assert np.mean(np.abs(found - INT4.quantize(rows)) < 1e-3) < 0.1


def test_the_table_of_a_model(tmp_path, capsys):
    file = tmp_path / "rows.json"
    chosen = ("--quantizers", "nearest", "other", "awq", "--seeds", "1", "--json", str(file))
    main(["--models", "mlp-standard-int4", *chosen])
    shown = capsys.readouterr().out
    rows = json.loads(file.read_text())
    attacks = {(row["quantizer"], row["given"]): row["attack"] for row in rows}
    assert attacks["nearest", GIVEN[0]] > 0.9
    assert attacks["other", GIVEN[0]] > 0.5
    assert max(rate for (_, given), rate in attacks.items() if given != GIVEN[0]) < 0.02
    assert (
        f"| mlp-standard-int4 | 0.000 / 0.964 | nearest | {attacks['nearest', GIVEN[0]]:.3f}"
        in shown
    )
    handed_on.main(["--load", str(file)])
    assert capsys.readouterr().out == shown
