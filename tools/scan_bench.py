"""What `scan` finds and what it does not: Markdown tables.

    python tools/fetch_models.py
    python -m tools.scan_bench [attacks] [clean] [planted] [training] [--models NAME...]

attacks: every model of models/attacks, beside what it was made for. clean: every real model, as it
is, in float16 and bfloat16, pruned, and quantized and decoded again. planted: the standard attack's
shift in a share of the weights of a clean model. training: quantization-aware training (needs
torch and scikit-learn).
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flipguard_onnx.detection.alignment import GRIDS, sample_size
from flipguard_onnx.detection.scan import conclude, examine
from flipguard_onnx.errors import UnsupportedModelError
from flipguard_onnx.graph.weights import Weight, find_weights
from flipguard_onnx.io.model import Model, open_model
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.schemes import SCHEMES
from flipguard_onnx.reports.scan import Verdict

MODELS = Path(__file__).resolve().parent.parent / "models"
PARTS = ("attacks", "clean", "planted", "training")
NAMES = {"int8": "int8 channel", "int8_tensor": "int8 tensor"}  # those of the manifest
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05)
SIZES = (100_000, 500_000, 2_000_000)
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
    rng, max_weights = np.random.default_rng(0), sample_size(tensors)
    examined = [examine(w, w.stored(values), max_weights, rng) for w, values in pairs]
    return conclude(source, examined, (), 0.0).verdict


def attacks() -> None:
    """Detections and attributions."""
    print("| model | attacker | made for | verdict | named | strength |")
    print("|---|---|---|---|---|---|")
    tally = {"strong": 0, "found": 0, "named": 0, "false alarms": 0, "clean": 0}
    for entry in json.loads((MODELS / "attacks" / "manifest.json").read_text()):
        verdict = verdict_on(MODELS / "attacks" / entry["file"])
        wanted = {NAMES.get(scheme, scheme) for scheme in entry["schemes"]}
        if not wanted:
            tally["clean"] += 1
            tally["false alarms"] += verdict.alarming
        elif entry["attacker"] != "rounding":
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
        verdicts = [verdict_on(path, change) for change in VERSIONS.values()]
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
    scheme, flat = GRIDS[name]
    blocks = weight.blocks(SCHEMES[scheme].block_size, flat)
    weights = values.astype(np.float32)
    return SCHEMES[scheme].fit(weights, blocks, values.dtype, get_backend("cpu")), weights


VERSIONS: dict[str, Change] = {
    "as it is": lambda _, values: values,
    "float16": lambda _, values: values.astype(np.float16),
    "bfloat16": lambda _, values: values.astype(ml_dtypes.bfloat16),
    "bfloat16 in float32": lambda _, values: values.astype(ml_dtypes.bfloat16).astype(np.float32),
    "half pruned": _pruned,
    "int8 decoded": _decoded("int8 channel"),
    "int8 tensor decoded": _decoded("int8 tensor"),
    "int4 decoded": _decoded("int4"),
    "nf4 decoded": _decoded("nf4"),
}


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
    parser.add_argument("--models", nargs="*", default=[], help="of the clean ones")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        print(f"### {part}\n")
        if part == "clean":
            clean(options.models)
        else:
            {"attacks": attacks, "planted": planted, "training": training}[part]()


if __name__ == "__main__":
    main()
