"""The parts of tools.runtimes that need no other runtime."""

import json
import sys

import numpy as np
import pytest

from tests.helpers.samples import SAMPLES, save
from tools.runtimes import RUNTIMES, Cell, distance, encoded, exact, main, problems, table


def cell(runtime, distance=1e-7, problem="", **facts):
    facts = {"mebibytes": None, "integers": None, "version": "1"} | facts
    return Cell("m", "int8", "portable", runtime, distance=distance, problem=problem, **facts)


def test_distance_is_over_all_float_outputs():
    wanted = [np.array([3.0, 0.0]), np.array([4.0]), np.array([7])]
    moved = [np.array([3.0, 0.5]), np.array([4.0]), np.array([1])]
    assert distance(wanted, wanted) == 0
    assert distance(moved, wanted) == pytest.approx(0.1)
    assert distance([moved[0][:1], *moved[1:]], wanted) == float("inf")


@pytest.mark.parametrize("runtime", ["reference", "onnxruntime"])
def test_a_run_is_a_process_that_gets_and_gives_json(tmp_path, runtime):
    model, feed = save(SAMPLES["gather"](), tmp_path), tmp_path / "feed.json"
    feed.write_text(encoded({"ids": np.array([[0, 39], [3, 3]])}))
    got, wanted = RUNTIMES[runtime](sys.executable)(model, feed), exact(model, feed)
    assert got.version
    assert got.outputs[0].shape == (2, 2, 48)
    assert distance(got.outputs, wanted.outputs) == 0
    feed.write_text(encoded({"ids": np.array([[40]])}))
    assert "out of" in RUNTIMES[runtime](sys.executable)(model, feed).problem


def test_a_file_with_external_data_takes_the_name_that_it_is_given(tmp_path, capsys):
    path = save(SAMPLES["matmul"](), tmp_path, external=True)
    rows = tmp_path / "rows.json"
    asked = ["--forms", "int8", "--targets", "portable", "--json", str(rows)]
    main(["--models", f"mine={path}", *asked])
    assert "| mine | int8 | portable |" in capsys.readouterr().out
    cells = [Cell(**row) for row in json.loads(rows.read_text())["cells"]]
    assert {cell.model for cell in cells} == {"mine"}
    far = {(cell.form, cell.runtime): cell.distance for cell in cells}
    assert far["int8", "drift"] > 1e-4
    assert far["int8", "reference"] < 1e-5


def test_the_table_and_the_problems():
    cells = [
        cell("drift", 0.1),
        cell("openvino", mebibytes=104, integers=1.0),
        cell("web", None, "Error:\n no kernel"),
    ]
    head, _, row = table(cells).splitlines()
    assert head == "| model | form | target | drift 1 | openvino 1 | web 1 |"
    assert row == "| m | int8 | portable | 1e-01 | 1e-07 (100%, 104 MiB) | fails |"
    assert problems(cells) == "- web: m int8 portable: Error: no kernel"


def test_a_place_without_a_known_runtime_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--run", "tensorrt=/usr"])
    assert "RUNTIME one of reference, onnxruntime" in capsys.readouterr().err


def test_earlier_runs_are_joined(tmp_path, capsys):
    for name in ("web", "openvino"):
        rows = {"cells": [cell(name).__dict__]}
        (tmp_path / name).write_text(json.dumps(rows))
    main(["--load", str(tmp_path / "web"), str(tmp_path / "openvino")])
    assert "| m | int8 | portable | 1e-07 | 1e-07 |" in capsys.readouterr().out
