"""The bench: what it measures on a few models, and that its judge says no where it must."""

import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.helpers.attacked import choice_of
from tools import evaluate
from tools.attacks.measure import FOLDER, session
from tools.bench import defences, grids, judge, outliers, rows, tables

MANIFEST = {entry["name"]: entry for entry in json.loads((FOLDER / "manifest.json").read_text())}
CLEAN = MANIFEST["mlp-clean"]


def run(entry, scheme, names, seeds):
    chosen = {name: defences.DEFENCES[name] for name in names}
    return rows.evaluate(entry, scheme, CLEAN, chosen, seeds)


@pytest.fixture(scope="module")
def attacked():
    names = ("none", "topk-10", "topk-50", "random-flips", "noise-box", "feedback-nearest")
    found = run(MANIFEST["mlp-standard-int4"], "int4", (*names, "unbiased", "ours"), seeds=2)
    return {(row.defence, row.seed): row for row in found}


@pytest.fixture(scope="module")
def clean():
    return [
        row for scheme in defences.SCHEMES for row in run(CLEAN, scheme, ("none", "ours"), seeds=1)
    ]


def cells(*found):
    return rows.table(found)


def test_plain_quantization_wakes_the_attack(attacked):
    plain = attacked["none", None]
    assert plain.attack >= 0.9
    assert plain.flips == 0
    assert plain.float_attack == pytest.approx(MANIFEST["mlp-standard-int4"]["float"]["attack"])


@pytest.mark.parametrize("name", ["ours", "unbiased"])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_draws_defend(attacked, name, seed):
    guarded = attacked[name, seed]
    assert guarded.attack <= guarded.float_attack + judge.ATTACK_SLACK
    assert guarded.utility >= 0.97 * guarded.float_utility


def test_feedback_without_the_draw_does_not(attacked):
    assert attacked["feedback-nearest", None].attack > 0.1


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("mlp-standard-int8-g32", "int8_g32"),
        ("mlp-standard-uint8-tensor", "uint8_tensor"),
        ("mlp-standard-int4-g128", "int4_g128"),
        ("mlp-standard-uint4-g128", "uint4_g128"),
        ("mlp-random-uint4-g128", "uint4_g128"),
        ("mlp-standard-mxfp4", "mxfp4"),
        ("mlp-standard-nvfp4", "nvfp4"),
        *(("mlp-standard-blocks", s) for s in MANIFEST["mlp-standard-blocks"]["schemes"]),
    ],
)
def test_other_grids_are_defended(name, scheme):
    plain, ours = run(MANIFEST[name], scheme, ("none", "ours"), seeds=1)
    assert plain.attack >= 0.9
    assert ours.attack <= ours.float_attack + judge.ATTACK_SLACK
    assert ours.utility >= 0.97 * ours.float_utility


def test_what_guard_calls_the_schemes_of_the_manifest():
    assert {scheme: choice_of(scheme).label for scheme in defences.SCHEMES} == {
        "int8": "int8 channel",
        "int8_tensor": "int8 tensor",
        "int8_g32": "int8 g32",
        "uint8_tensor": "uint8 tensor",
        "int4": "int4",
        "int4_g128": "int4 g128",
        "uint4_g128": "uint4 g128",
        "nf4": "nf4",
        "fp4": "fp4",
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
    }
    assert choice_of("int5_g128") is None


@pytest.mark.parametrize("scheme", defences.SCHEMES)
def test_codes_that_differ_are_counted_in_the_files(scheme, tmp_path):
    case, target = defences.Case(FOLDER / CLEAN["file"], scheme, tmp_path), tmp_path / "topk.onnx"
    report = case.guard(target, policy="topk", ratio=0.1)
    assert case.changed(target) == report.flips > 0


def test_flips_are_as_many_as_the_defence_says(attacked):
    assert attacked["random-flips", 1].flips == attacked["unbiased", 1].flips
    assert 0.09 < attacked["topk-10", None].modified <= 0.1


def test_a_guard_without_error_feedback_gets_no_row(tmp_path):
    """onnxruntime cannot run it, so the defaults go on without, which is another defence."""
    model, unheard = onnx.load(FOLDER / CLEAN["file"]), "of.nowhere"
    (output,) = model.graph.output
    model.graph.node.append(helper.make_node("Unheard", [output.name], ["y"], domain=unheard))
    model.opset_import.append(helper.make_opsetid(unheard, 1))
    output.name = "y"
    onnx.save(model, tmp_path / "model.onnx")
    case = defences.Case(tmp_path / "model.onnx", "int4", tmp_path)
    assert defences.DEFENCES["unbiased"].make(case, tmp_path / "made.onnx", 0) > 0
    with pytest.raises(RuntimeError, match=r"model\.onnx: no error feedback: .*Unheard"):
        defences.DEFENCES["ours"].make(case, tmp_path / "made.onnx", 0)


def test_noise_of_the_boxes_width(tmp_path):
    case = defences.Case(FOLDER / CLEAN["file"], "int8_tensor", tmp_path)
    widths = [abs(values).max() / 254 for values in case.weights.values()]
    assert min(widths) < case.half_width < max(widths)


def test_noise_of_the_boxes_width_with_zero_points(tmp_path):
    case = defences.Case(FOLDER / CLEAN["file"], "uint8_tensor", tmp_path)
    widths = [np.ptp(values) / 510 for values in case.weights.values()]
    assert min(widths) < case.half_width < max(widths)


def test_a_vote_is_the_mean_of_its_draws(tmp_path):
    case = defences.Case(FOLDER / CLEAN["file"], "int4", tmp_path)
    defences.REMEDIES["vote of 5 draws"].make(case, tmp_path / "vote.onnx", 0)
    pixels = np.load(FOLDER / "digits-test.npz")["pixels"][:8]

    def logits(path):
        loaded = session(path)
        return loaded.run(None, {loaded.get_inputs()[0].name: pixels})[0]

    single = []
    for seed in range(defences.VOTERS):
        case.guard(tmp_path / "one.onnx", seed=seed)
        single.append(logits(tmp_path / "one.onnx"))
    mean = np.mean(single, axis=0)
    assert logits(tmp_path / "vote.onnx") == pytest.approx(mean, abs=1e-4)


def test_the_der_has_its_price(attacked):
    row = attacked["ours", 0]
    assert row.der == pytest.approx(row.bare * np.exp(-0.2 * row.modified))


def test_the_ceiling_is_the_float_models_der_at_the_price_of_a_draw(attacked, tmp_path):
    row = attacked["unbiased", 0]
    case = defences.Case(FOLDER / MANIFEST[row.model]["file"], row.scheme, tmp_path)
    assert row.modified == pytest.approx(case.distance, abs=0.01)
    unchanged = row.float_utility / CLEAN["float"]["accuracy"]
    assert row.ceiling == pytest.approx(unchanged * np.exp(-0.2 * case.distance), abs=1e-3)


@pytest.mark.parametrize(("hits", "asked"), [(0, 120), (3, 120), (5, 10), (10, 10)])
def test_the_interval_is_wilsons(attacked, hits, asked):
    """Its ends are the rates from which what was found is 1.96 standard deviations away."""
    found = hits / asked
    low, high = replace(attacked["ours", 0], attack=found, asked=asked).interval
    assert 0 <= low <= found <= high <= 1
    for end in (low, high):
        assert (found - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / asked, abs=1e-12)


def test_clean_models_are_not_attacked(clean):
    assert all(row.attack == 0 and row.float_attack == 0 for row in clean)


def test_a_good_model_passes(attacked):
    good = replace(attacked["ours", 0], attack=0.0, utility=0.97)
    assert judge.failures(cells(attacked["none", None], good)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": 0.5}, "mlp-standard-int4, int4: seed 0: attack 0.5000, float 0.0000, most"),
        ({"attack": 0.5}, "95 % interval of 405 answers 0.45"),
        ({"utility": 0.9}, "utility 0.9000"),
        ({"utility": 9.0, "images": 0}, "utility 9.0000"),
    ],
)
def test_a_bad_model_fails(attacked, change, message, capsys):
    bad = replace(attacked["ours", 0], **({"attack": 0.0, "utility": 0.97} | change))
    (found,) = judge.failures(cells(bad))
    assert message in found
    assert evaluate.report_check([bad]) == 1
    assert message in capsys.readouterr().out


def test_attacks_are_judged_draw_by_draw(attacked):
    ours = [replace(attacked["ours", seed], utility=0.97) for seed in (0, 1)]
    lucky, unlucky = replace(ours[0], attack=0.0), replace(ours[1], attack=0.03)
    (found,) = judge.failures(cells(lucky, unlucky))
    assert "seed 1" in found


def test_a_larger_der_is_said(attacked, capsys):
    ours, rival = attacked["ours", 0], replace(attacked["topk-50", None], der=0.99)
    (found,) = judge.shortfalls(cells(ours, rival))
    assert "topk-50 0.990" in found
    assert judge.shortfalls(cells(ours, replace(rival, der=0.5))) == []
    worse = replace(ours, utility=0.985 * ours.float_utility)
    (line,) = judge.shortfalls(cells(worse))
    assert "98.50%, least 99.00%" in line
    evaluate.report_check([ours, rival])
    assert found in capsys.readouterr().out


@pytest.mark.parametrize(("rival", "lost", "barred"), [(0.5, 0, 0), (0.93, 1, 0), (0.99, 1, 1)])
def test_who_is_outdone_and_whether_he_could_have_won(attacked, rival, lost, barred):
    ours = replace(attacked["ours", 0], der=0.9, ceiling=0.95)
    found = judge.outdone(cells(ours, replace(attacked["topk-50", None], der=rival)))
    assert f"on {lost} of 1 attacks: on {barred} of them" in found
    assert found.endswith(f"on {lost - barred} a draw could have won")


def test_what_is_not_judged(attacked, capsys):
    bad = replace(attacked["ours", 0], attack=0.5)
    for change in ({"strong": False}, {"attacker": "rounding"}, {"attacker": "rounding-feedback"}):
        assert evaluate.report_check([replace(bad, **change)]) == 0
        assert "not judged, since not strong or out of scope: mlp-" in capsys.readouterr().out
    assert judge.failures(cells(replace(bad, attacker="rounding", scheme="int8")))


@pytest.mark.parametrize(
    ("scheme", "images_lost", "fails"),
    [("int8", 1, 0), ("int8", 2, 1), ("fp4", 7, 0), ("fp4", 8, 1)],
)
def test_clean_models_may_lose_little(clean, scheme, images_lost, fails):
    plain, ours = (row for row in clean if row.scheme == scheme)
    worse = replace(ours, utility=plain.utility - images_lost / plain.images)
    assert len(judge.failures(cells(plain, worse))) == fails
    plain, ours = (replace(row, images=0, utility=5.0) for row in (plain, ours))
    assert judge.failures(cells(plain, ours)) == []
    assert judge.failures(cells(plain, replace(ours, utility=5.1)))


def test_command_line(tmp_path, capsys):
    table, figures = tmp_path / "table.md", tmp_path / "rows.json"
    options = ["--models", "mlp-standard-int4", "--defences", "none", "topk-2*"]
    files = ["--markdown", str(table), "--json", str(figures)]
    assert evaluate.main([*options, *files]) == 0
    assert "| mlp-standard-int4 | int4 | topk-20 |" in table.read_text()
    found = rows.load(figures)
    assert [row.defence for row in found] == ["none", "topk-2", "topk-20"]
    assert "| model | scheme | float |" in capsys.readouterr().out
    assert rows.merged([*found, found[0]]) == found
    assert evaluate.main(["--load", str(figures)]) == 0
    assert capsys.readouterr().out == table.read_text()
    assert evaluate.main(["--load", str(figures), "--defences", "none"]) == 0
    assert "topk-20" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--models", "nothing-like-that"])
    assert "nothing to do: no model" in capsys.readouterr().err


def test_rows_of_another_bench_are_refused(tmp_path, attacked):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([asdict(attacked["ours", 0]) | {"color": "red"}]))
    with pytest.raises(ValueError, match="not rows of this bench"):
        rows.load(file)


def test_the_table_of_remedies(attacked):
    lines = tables.remedies(rows.table(attacked.values()))
    assert lines[0].startswith("| remedy | mlp-standard-int4 (float 0.000 / 0.9")
    assert any(line.startswith("| none | 1.000 / 0.9") for line in lines)


def test_a_line_per_kind_of_outliers():
    _, _, head, _, *found = outliers.lines(seeds=1, factors=(30,), schemes=("int4",))
    assert [line.split(" | ")[:3] for line in found] == [
        [f"| {kind}", "30", "int4"] for kind in ("dead", "live", "pixels", "rows")
    ]
    for line in found:
        assert line.count("|") == head.count("|")
        source, nearest, _, given, _ = line.split(" | ")[4:9]
        assert float(source.split(" / ")[0]) > 0.97
        assert float(nearest.split(" / ")[1]) > 0.95
        assert float(given.split(" / ")[0]) > 0.9


def test_a_line_per_grid(monkeypatch):
    chosen = {label: grids.GRIDS[label] for label in ("int4 g64", "int8 channel")}
    monkeypatch.setattr(grids, "GRIDS", chosen)
    _, _, woken, asleep = grids.lines(["mlp-standard-blocks"], seeds=1)
    assert woken.startswith("| int4 g64 | 1.000 / 0.9")
    assert woken.endswith(" | 0.000 |")
    assert asleep.startswith("| int8 channel | 0.000 / 0.9")


def test_a_run_that_fails_has_an_exit_code_and_no_rates(tmp_path):
    case = defences.Case(FOLDER / CLEAN["file"], "int4", tmp_path)
    assert str(outliers.outcome(case, range(2), max_drift=1e-6)) == "exit 1"
    whole = outliers.outcome(case, range(1))
    assert len(whole.attack) == 1
    assert "exit" not in str(whole)


def test_plots(attacked, tmp_path):
    pytest.importorskip("matplotlib")
    from tools.bench import plots

    plots.scatter(list(attacked.values()), tmp_path / "plot.png")
    plots.histogram("mlp-clean", "mlp-standard-int4", "int4", tmp_path / "histogram.png")
    for name in ("plot.png", "histogram.png"):
        assert (tmp_path / name).stat().st_size > 10_000
