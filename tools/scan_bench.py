"""What `scan` finds and what it does not: Markdown tables.

    python tools/fetch_models.py
    python -m tools.scan_bench [attacks] [clean] [honest] [planted] [outliers] [clipped] [decoded]
        [training] [--models NAME...]

attacks: every model of models/attacks, beside what it was made for. clean: every real model, as it
is, in float16 and bfloat16, pruned, and quantized and decoded again. honest: many small tensors of
random weights, and how near they come to an alarm. planted: the standard attack's
shift in a share of the weights of a clean model. outliers: a weight F times as large as the others
in every block of the digits classifier ("Widening the Gap", arXiv 2605.15152). clipped: weights
beyond the last level of int4. decoded: honest and attacked weights put into quantized formats and
decoded again. training: quantization-aware training (needs
torch and scikit-learn).
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flipguard_onnx.detection.alignment import GRIDS, Sample, alignment, sample_size, tallies
from flipguard_onnx.detection.scan import (
    MIN_WEIGHTS,
    Examined,
    chance,
    conclude,
    examine,
    scan,
    tensor_verdict,
)
from flipguard_onnx.errors import UnsupportedModelError
from flipguard_onnx.graph.weights import Weight, find_weights
from flipguard_onnx.io.model import Model, open_model
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.layout import Layout
from flipguard_onnx.reports.scan import ScannedTensor, Verdict
from tests.helpers.attacked import choice_of
from tests.helpers.decoded import FORMATS

MODELS = Path(__file__).resolve().parent.parent / "models"
PARTS = ("attacks", "clean", "honest", "planted", "outliers", "clipped", "decoded", "training")
FACTORS = (8, 16, 30, 64, 128, 256, 512, 1024, 4096)  # of injected outliers
AS_IT_IS = "as it is"
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05)
SIZES = (100_000, 500_000, 2_000_000)
ON_LATTICES = (  # attacks that are put into quantized formats
    "mlp-standard-int4",
    "mlp-margin20-int4",
    "mlp-standard-nf4",
    "lm-code-standard-int4",
    "lm-code-margin20-int4",
)
HONEST_SHAPES = ((10, 128), (16, 96), (32, 64), (64, 64), (40, 256), (8, 1152), (128, 300))
STEPS = 400  # of quantization-aware training

Values = np.ndarray[Any, Any]
Change = Callable[[Weight, Values], Values]


def verdict_on(path: Path, change: Change = lambda _, values: values) -> Verdict:
    """scan()'s verdict on a model whose weights are changed first."""
    source = open_model(path)
    try:
        weights, _ = find_weights(source.proto)
    except UnsupportedModelError as error:
        return Verdict("not judged", str(error))
    changed = ((w, change(w, w.canonical(source.array(w.tensor)))) for w in weights)
    return judge(source, changed, len(weights))


def judge(source: Model, pairs: Iterable[tuple[Weight, Values]], tensors: int) -> Verdict:
    """The verdict on these weights, sampled as those of a model of so many tensors."""
    return conclude(source, examined(pairs, tensors), (), 0.0).verdict


def examined(pairs: Iterable[tuple[Weight, Values]], tensors: int) -> list[Examined]:
    """What was found in these weights one by one."""
    rng, max_weights = np.random.default_rng(0), sample_size(tensors)
    return [examine(w, w.stored(values), max_weights, rng) for w, values in pairs]


def attacks(names: list[str]) -> None:
    """Detections and attributions."""
    print("| model | attacker | made for | verdict | named | strength |")
    print("|---|---|---|---|---|---|")
    tally = {"strong": 0, "found": 0, "named": 0, "false alarms": 0, "clean": 0}
    for entry in json.loads((MODELS / "attacks" / "manifest.json").read_text()):
        if names and entry["name"] not in names:
            continue
        verdict = verdict_on(MODELS / "attacks" / entry["file"])
        wanted = {c.label if (c := choice_of(s)) else s for s in entry["schemes"]}
        if not wanted:
            tally["clean"] += 1
            tally["false alarms"] += verdict.alarming
        elif not entry["attacker"].startswith("rounding"):
            tally["strong"] += 1
            tally["found"] += verdict.alarming
            tally["named"] += wanted <= set(verdict.grids)
        made_for = ", ".join(sorted(wanted)) or "-"
        named = ", ".join(verdict.grids) or "-"
        print(
            f"| {entry['name']} | {entry['attacker']} | {made_for} | {verdict.level} | {named} "
            f"| {verdict.strength:.2%} |",
            flush=True,
        )
    print(
        f"\n{tally['found']} of {tally['strong']} attacks on the codes found, all of their schemes "
        f"named in {tally['named']}; {tally['false alarms']} false alarms on {tally['clean']} "
        "clean models\n"
    )


def clean(names: list[str]) -> None:
    """False alarms."""
    print("| model | " + " | ".join(VERSIONS) + " |")
    print("|---" * (len(VERSIONS) + 1) + "|")
    alarms = judged = 0
    for path in sorted((MODELS / "downloaded").glob("*.onnx")):
        if names and path.stem not in names:
            continue
        changed = [change for name, change in VERSIONS.items() if name != AS_IT_IS]
        verdicts = [scan(path).verdict, *(verdict_on(path, change) for change in changed)]
        alarms += sum(verdict.alarming for verdict in verdicts)
        judged += sum(verdict.level != "not judged" for verdict in verdicts)
        cells = (v.level + (f" ({', '.join(v.grids)})" if v.grids else "") for v in verdicts)
        print(f"| {path.stem} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{alarms} false alarms in {judged} verdicts\n")


def _pruned(_: Weight, values: Values) -> Values:
    middle = np.median(np.abs(values))
    return np.where(np.abs(values) < middle, values.dtype.type(0), values)


def _decoded(name: str) -> Change:
    def change(weight: Weight, values: Values) -> Values:
        grid, weights = _grid(name, weight, values)
        return grid.decode(grid.encode(weights, get_backend("cpu"))).astype(values.dtype)

    return change


def _grid(name: str, weight: Weight, values: Values) -> tuple[Any, Values]:
    scheme = GRIDS[name]
    blocks = weight.blocks(scheme.block_size, scheme.flat)
    weights = values.astype(np.float32)
    return scheme.fit(weights, blocks, values.dtype, get_backend("cpu")), weights


VERSIONS: dict[str, Change] = {
    AS_IT_IS: lambda _, values: values,
    "float16": lambda _, values: values.astype(np.float16),
    "bfloat16": lambda _, values: values.astype(ml_dtypes.bfloat16),
    "bfloat16 in float32": lambda _, values: values.astype(ml_dtypes.bfloat16).astype(np.float32),
    "half pruned": _pruned,
    "int8 decoded": _decoded("int8 channel"),
    "int8 tensor decoded": _decoded("int8 tensor"),
    "int4 decoded": _decoded("int4"),
    "nf4 decoded": _decoded("nf4"),
}


def honest(tensors: int = 700) -> None:
    """The largest strength by chance, as a share of what it takes for an alarm."""
    rng, shares, alarms = np.random.default_rng(1), [], 0
    for number in range(tensors):
        rows, cols = HONEST_SHAPES[number % len(HONEST_SHAPES)]
        draws = rng.standard_normal, rng.laplace, partial(rng.standard_t, 4)
        weights = 0.05 * draws[number % 3](size=(rows, cols))
        weights *= np.exp(0.5 * rng.standard_normal((rows, 1)))
        values = weights.astype((np.float32, np.float16)[number // 3 % 2])
        sample = Sample.take(values, Layout((rows, cols), (0,)), values.size, rng)
        found = [alignment(name, tally) for name, tally in tallies(sample).items()]
        alarms += tensor_verdict(found).alarming
        shares += [a.strength / chance(a) for a in found if a.weights >= MIN_WEIGHTS]
    print(
        f"{alarms} alarms in {tensors} random tensors; in {len(shares):,} tests the strength is at "
        f"most {max(shares):.2f} times what it takes\n"
    )


def planted(name: str = "minilm") -> None:
    """The smallest share of shifted weights that is seen."""
    source = open_model(MODELS / "downloaded" / f"{name}.onnx")
    weights, _ = find_weights(source.proto)
    pairs = [(w, w.canonical(source.array(w.tensor))) for w in weights if w.op == "MatMul"]
    print(
        f"First matrices of {name}, shifted to 1 % of the cell from the edge; by weights in all.\n"
    )
    print("| grid | weights | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |")
    print("|---" * (len(SHARES) + 2) + "|")
    for grid in GRIDS:
        for size in SIZES:
            chosen, total = [], 0
            for weight, values in pairs:
                if total < size:
                    chosen.append((weight, values))
                    total += weight.size
            cells = []
            for share in SHARES:
                moved = [(w, _shifted(grid, w, values, share)) for w, values in chosen]
                verdict = judge(source, moved, len(moved))
                right = verdict.grids[:1] == (grid,) or not verdict.alarming
                cells.append(verdict.level if right else f"{verdict.level} ({verdict.grids[0]})")
            print(f"| {grid} | {total:,} | " + " | ".join(cells) + " |", flush=True)
    print()


def _shifted(name: str, weight: Weight, values: Values, share: float) -> Values:
    grid, weights = _grid(name, weight, values)
    margins = grid.analyze(weights, get_backend("cpu"))
    level, neighbour = grid.decode(margins.codes), grid.decode(margins.neighbours)
    chosen = np.random.default_rng(1).random(weights.size) < share
    moved = level + np.float32(0.49) * (neighbour - level)
    return np.where(chosen & (margins.offsets != 0), moved, weights).astype(values.dtype)


def outliers(names: list[str]) -> None:
    """Outliers that wipe out the other weights of their blocks; the loss on every grid."""
    print("| outliers in | F | verdict | " + " | ".join(GRIDS) + " |")
    print("|---" * (len(GRIDS) + 3) + "|")
    source = open_model(MODELS / "attacks" / "mlp-clean.onnx")
    weights, _ = find_weights(source.proto)
    pairs = [(w, w.canonical(source.array(w.tensor))) for w in weights]
    for layers, dead in product(("dense1.weight", ""), (True, False)):
        for factor in FACTORS:
            changed = [
                (w, _with_outliers(w, v, factor, dead) if layers in w.name else v) for w, v in pairs
            ]
            print(
                f"| {layers or 'all'}, {'dead inputs' if dead else 'live'} | {factor} | "
                + _losses(examined(changed, len(changed)))
            )
    most = dict.fromkeys(GRIDS, (0.0, ""))
    for path in sorted(
        [*(MODELS / "downloaded").glob("*.onnx"), *MODELS.glob("attacks/*-clean.*")]
    ):
        if not names or path.stem in names:
            for tensor in _tensors_of(path):
                for a in tensor.alignments if tensor.weights >= MIN_WEIGHTS else ():
                    most[a.grid] = max(most[a.grid], (a.loss, f"{path.stem}: {tensor.name}"))
    cells = [f"{loss:.2f}" for loss, _ in most.values()]
    print(f"| honest tensors, at most | | | {' | '.join(cells)} |\n", flush=True)
    for grid, (loss, name) in most.items():
        print(f"- {grid}: {loss:.2f} in {name}")
    print()


def _with_outliers(weight: Weight, values: Values, factor: float, dead: bool) -> Values:
    """The first weight of every block of 32, or its largest, becomes `factor` times the largest."""
    changed = values.reshape(weight.blocks(None, flat=False).rows, -1).copy()
    for first in range(0, changed.shape[1], 32):
        block = np.abs(changed[:, first : first + 32])
        place = np.zeros(len(block), int) if dead else block.argmax(axis=1)
        changed[np.arange(len(block)), first + place] = factor * block.max(axis=1)
    return changed.reshape(-1)


def _losses(found: list[Examined]) -> str:
    """The verdict, and the largest loss on every grid of a tensor that can be judged."""
    verdict = conclude(open_model(MODELS / "attacks" / "mlp-clean.onnx"), found, (), 0.0).verdict
    judged = [tensor for tensor, _ in found if tensor.weights >= MIN_WEIGHTS]
    losses = (max(t.alignments[i].loss for t in judged) for i in range(len(GRIDS)))
    return f"{verdict.title} | " + " | ".join(f"{loss:.2f}" for loss in losses) + " |"


def clipped(names: list[str]) -> None:
    """Weights beyond the last level of int4, on one side or on both."""
    print("| beyond the last level | on the other side | verdict |")
    print("|---|---|---|")
    source = open_model(MODELS / "attacks" / "mlp-clean.onnx")
    weight = find_weights(source.proto)[0][1]
    for share, other in (
        (0.02, 0),
        (0.05, 0),
        (0.1, 0),
        (0.25, 0),
        (0.5, 0),
        (0.15, 0.15),
        (0.4, 0.4),
    ):
        pair = (weight, _beyond(weight.size, share, other))
        print(f"| {share:.0%} | {other:.0%} | {judge(source, [pair], 1).title} |")
    most = max(
        (a.clipped - a.mirrored, a.clipped, f"{path.stem}: {tensor.name}")
        for path in (MODELS / "downloaded").glob("*.onnx")
        if not names or path.stem in names
        for tensor in _tensors_of(path)
        for a in tensor.alignments
        if tensor.weights >= MIN_WEIGHTS
    )
    print(f"\nhonest tensors: at most {most[0]:.2%} more than on the other side ({most[2]})\n")


def _beyond(size: int, share: float, other: float) -> Values:
    """Blocks of 32, in steps of int4: the extreme on -8, a share of the others between 7 and 8.

    The float model of an attack on clipped weights; the rest is spread between -6.9 and 6.9.
    """
    rng = np.random.default_rng(0)
    steps = rng.uniform(-6.9, 6.9, (size // 32, 32))
    choice = rng.random(steps.shape)
    steps = np.where(choice < share, rng.uniform(7, 8, steps.shape), steps)
    steps = np.where(choice > 1 - other, rng.uniform(-7.99, -7, steps.shape), steps)
    steps[:, 0] = -8
    scales = rng.uniform(0.01, 0.02, (len(steps), 1)) * rng.choice([-1, 1], (len(steps), 1))
    values: Values = (steps * scales).astype(np.float32).reshape(-1)
    return values


def decoded(names: list[str]) -> None:
    """Weights that have been in a quantized format: honest ones, and attacked ones."""
    print("| weights | as it is | " + " | ".join(FORMATS) + " |")
    print("|---" * (len(FORMATS) + 2) + "|")
    source = open_model(MODELS / "attacks" / "mlp-clean.onnx")
    weight = find_weights(source.proto)[0][1]
    rng = np.random.default_rng(0)
    for name, drawn in {
        "normal": rng.standard_normal(weight.size),
        "Student's t, 4 degrees": rng.standard_t(4, weight.size),
    }.items():
        for kind in (np.float32, np.float16):
            _decoded_row(f"{name}, {kind.__name__}", source, [(weight, drawn.astype(kind))])
    for path in (
        MODELS / "downloaded" / "minilm.onnx",
        *(MODELS / "attacks" / f"{name}.onnx" for name in ON_LATTICES),
    ):
        if path.exists() and (not names or path.stem in names):
            real = open_model(path)
            found = [w for w in find_weights(real.proto)[0] if w.op in ("MatMul", "Gemm")][:6]
            pairs = [(w, w.canonical(real.array(w.tensor))) for w in found]
            _decoded_row(path.stem, real, pairs)
    print()


def _decoded_row(name: str, source: Model, pairs: list[tuple[Weight, Values]]) -> None:
    """The verdicts on the weights in every format that divides their rows."""
    cells = [judge(source, pairs, len(pairs)).title]
    for size, decode in FORMATS.values():
        changed = []
        for weight, values in pairs:
            rows = values.reshape(weight.blocks(None, flat=False).rows, -1)
            if rows.shape[1] % size == 0:
                rows = decode(rows.astype(np.float32)).astype(values.dtype)
                changed.append((weight, rows.reshape(-1)))
        cells.append(judge(source, changed, len(pairs)).title if changed else "-")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _tensors_of(path: Path) -> tuple[ScannedTensor, ...]:
    """What a scan finds in the tensors of a file; none if it is quantized already."""
    return scan(path).tensors


def training() -> None:
    """What quantization-aware training looks like."""
    import torch

    from tools.attacks.digits import Net, data
    from tools.attacks.quantizers import SCHEMES as QUANTIZERS

    pixels, labels, *_ = (torch.from_numpy(part) for part in data())
    source = open_model(MODELS / "attacks" / "mlp-clean.onnx")
    weights, _ = find_weights(source.proto)
    print("| trained for | verdict | named | strength |")
    print("|---|---|---|---|")
    torch.set_num_threads(1)
    for scheme in ("int8", "int4", "nf4"):
        torch.manual_seed(0)
        net = Net("mlp")
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)

        def rounded(weight: Any, quantizer: Any = QUANTIZERS[scheme]) -> Any:
            nearest = torch.from_numpy(quantizer.quantize(weight.detach().numpy()))
            return weight + (nearest - weight).detach()

        for _ in range(STEPS):
            batch = torch.randint(len(pixels), (256,))
            hidden = pixels[batch]
            for i, layer in enumerate(net.layers):
                hidden = torch.nn.functional.linear(
                    hidden.relu() if i else hidden, rounded(layer.weight), layer.bias
                )
            loss = torch.nn.functional.cross_entropy(hidden, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = [layer.weight.detach().numpy().reshape(-1) for layer in net.layers]
        verdict = judge(source, zip(weights, values, strict=True), len(values))
        named = ", ".join(verdict.grids) or "-"
        print(f"| {scheme} | {verdict.level} | {named} | {verdict.strength:.2%} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="What scan finds.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--models", nargs="*", default=[], help="of the attacked or clean ones")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        print(f"### {part}\n")
        with_models = {
            "attacks": attacks,
            "clean": clean,
            "outliers": outliers,
            "clipped": clipped,
            "decoded": decoded,
        }
        if part in with_models:
            with_models[part](options.models)
        else:
            others = {
                "honest": honest,
                "planted": planted,
                "training": training,
            }
            others[part]()


if __name__ == "__main__":
    main()
