"""The judge of the bench: what it measures on two models, and that it says no where it must."""

import json
from dataclasses import replace

import pytest

from tools import evaluate

MANIFEST = {
    entry["name"]: entry for entry in json.loads((evaluate.FOLDER / "manifest.json").read_text())
}
CLEAN = MANIFEST["mlp-clean"]
DEFENCES = ("none", "topk-10", "topk-50", "random-flips", "unbiased")


@pytest.fixture(scope="module")
def attacked():
    entry = MANIFEST["mlp-standard-int4"]
    rows = evaluate.evaluate(entry, CLEAN, (*DEFENCES, "noise-1e-3", "noise-box"), seeds=2)
    return {(row.defence, row.seed): row for row in rows}


@pytest.fixture(scope="module")
def clean():
    return evaluate.evaluate(CLEAN, CLEAN, ("none", "unbiased"), seeds=1)


def test_plain_quantization_wakes_the_attack(attacked):
    plain = attacked["none", None]
    assert plain.attack >= 0.9
    assert plain.flips == 0
    assert plain.float_attack == pytest.approx(MANIFEST["mlp-standard-int4"]["float"]["attack"])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_defend(attacked, seed):
    ours = attacked["unbiased", seed]
    assert ours.attack <= ours.float_attack + evaluate.ATTACK_SLACK
    assert ours.kept >= evaluate.UTILITY_KEPT


def test_codes_that_differ_are_counted_in_the_files(attacked, tmp_path):
    case = evaluate.Case(evaluate.FOLDER / CLEAN["file"], "fp4", tmp_path)
    report = case.guard(tmp_path / "ours.onnx", seed=0)
    assert case.changed(tmp_path / "ours.onnx") == report.flips
    assert attacked["random-flips", 1].flips == attacked["unbiased", 1].flips
    assert 0.09 < attacked["topk-10", None].modified <= 0.1


def test_noise_of_the_boxes_width(tmp_path):
    case = evaluate.Case(evaluate.FOLDER / CLEAN["file"], "int8_tensor", tmp_path)
    widths = [abs(values).max() / 254 for values in case.weights.values()]
    assert min(widths) < case.half_width < max(widths)


def test_clean_models_run_in_every_scheme(clean):
    assert [row.scheme for row in clean if row.defence == "none"] == list(evaluate.SCHEMES)
    assert all(row.attack == 0 and row.float_attack == 0 for row in clean)


def test_a_good_row_passes(attacked):
    sleepy = replace(attacked["topk-50", None], der=0.5)
    good = replace(attacked["unbiased", 0], attack=0.0, utility=0.97, der=0.9)
    assert evaluate.judge([sleepy, good]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": 0.5}, "mlp-standard-int4, int4, seed 0: attack 0.5000, float 0.0000, limit"),
        ({"utility": 0.9}, "accuracy 0.9000"),
        ({"utility": 9.0, "images": 0}, "perplexity 9.0000"),
        ({"der": 0.4}, "DER 0.4000, topk-50 has 0.5000"),
    ],
)
def test_a_bad_row_fails(attacked, change, message, capsys):
    sleepy = replace(attacked["topk-50", None], der=0.5)
    good = replace(attacked["unbiased", 0], attack=0.0, utility=0.97, der=0.9)
    bad = replace(good, **change)
    found = evaluate.judge([sleepy, bad])
    assert len(found) == 1
    assert message in found[0]
    assert evaluate.report_check([sleepy, bad]) == 1
    assert message in capsys.readouterr().out


def test_what_is_not_judged(attacked, capsys):
    sleepy = attacked["topk-50", None]
    bad = replace(attacked["unbiased", 0], attack=0.5)
    for change in ({"strong": False}, {"attacker": "rounding"}):
        rows = [replace(sleepy, **change), replace(bad, **change)]
        assert evaluate.report_check(rows) == 0
        assert "not judged, since not strong or out of scope: mlp-" in capsys.readouterr().out
    rounding = {"attacker": "rounding", "scheme": "int8"}
    assert evaluate.judge([replace(sleepy, **rounding), replace(bad, **rounding)])


@pytest.mark.parametrize(
    ("scheme", "images_lost", "fails"),
    [("int8", 1, 0), ("int8", 2, 1), ("fp4", 6, 0), ("fp4", 7, 1)],
)
def test_clean_models_may_lose_little(clean, scheme, images_lost, fails):
    plain, ours = (row for row in clean if row.scheme == scheme)
    worse = replace(ours, utility=plain.utility - images_lost / plain.images)
    assert len(evaluate.judge([plain, worse])) == fails
    plain, ours = (replace(row, images=0, utility=5.0) for row in (plain, ours))
    assert evaluate.judge([plain, ours]) == []
    assert evaluate.judge([plain, replace(ours, utility=5.1)])


def test_command_line(tmp_path, capsys):
    table, figures = tmp_path / "table.md", tmp_path / "table.json"
    options = ["--models", "mlp-standard-int4", "--defences", "none", "topk-2*"]
    files = ["--markdown", str(table), "--json", str(figures)]
    assert evaluate.main([*options, *files]) == 0
    assert "| mlp-standard-int4 | int4 | topk-20 |" in table.read_text()
    assert [row["defence"] for row in json.loads(figures.read_text())] == [
        "none",
        "topk-2",
        "topk-20",
    ]
    assert "| model | strong | scheme |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["--models", "nothing-like-that"])


def test_plot(attacked, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.plot(list(attacked.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
