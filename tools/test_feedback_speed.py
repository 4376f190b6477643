"""Stages and a pass of a small decoder."""

from pathlib import Path

import pytest

from tools import feedback_speed

EXPORTS = Path(__file__).parents[1] / "models" / "exports"


def test_all_stages_are_there_in_multiples_of_a_pass(monkeypatch, capsys):
    model = str(EXPORTS / "optimum" / "model.onnx")
    monkeypatch.setattr("sys.argv", ["feedback_speed", model, "--", "--scheme", "int4"])
    feedback_speed.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = {
        name: (float(s), float(n))
        for _, name, s, n, _ in (map(str.strip, x.split("|")) for x in lines)
    }
    assert {"sampling token ids", "recording what weights are multiplied with"} < rows.keys()
    whole, passed = rows.pop("all stages"), rows.pop("one pass")
    assert passed[1] == 1
    assert whole[0] == pytest.approx(sum(s for s, _ in rows.values()), abs=1)
