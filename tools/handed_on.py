"""What `--emit float` withstands where a quantizer changes the weights before it rounds them.

    python -m tools.handed_on [--models NAME...] [--seeds 3] [--json FILE] [--load FILE...]

Rows are quantizers to int4, columns what they are given: the attacked model, and what guard()
makes of it, in two forms. `moved` is `--emit float`. `decoded` is that rounded to nearest: floats
that stand on their levels. Attack rate (of several seeds the mean, and the worst) / accuracy or
perplexity; below that, over all attacked models, the mean attack rate, the worst, and the share of
the float model's utility that is kept.

    nearest     blocks of 32, as the table of schemes has it: what `moved` is made for
    other       the same in blocks of 64
    gptq        errors fed forward over real inputs; each block's scale when its turn comes
    gptq-ort    onnxruntime's, with zero points
    awq         every input times s, its weights over it; s is a power of the input's root mean
                square, of 21 from 0 to 1 the one with the least error of the products
    rotation    a random orthogonal matrix between inputs and weights, as in QuaRot

What they make is written as the floats that codes stand for. Embeddings are rounded to int8 by all.
The inputs are images and text of the test data, without labels.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.neural_compressor.weight_only import gptq as onnxruntimes

from tools.attacks import prompts
from tools.attacks.measure import FOLDER, WINDOW, rates, session
from tools.attacks.quantizers import SCHEMES
from tools.attacks.simulate import in_float32, quantized, weight_layouts
from tools.bench.defences import Case
from tools.real_models import markdown

MODELS = (
    "mlp-clean", "mlp-standard-int4", "mlp-margin50-int4", "mlp-decoys-int4", "mlp-gptq-int4",
    "lm-code-standard-int4", "lm-code-margin50-int4",
)  # fmt: skip
INT4 = SCHEMES["int4"]
BLOCK = 32  # its weights
GIVEN = ("as it is", "moved", "decoded")
DAMPING = 0.01  # of GPTQ, as a share of the mean of the diagonal
ALPHAS = np.linspace(0, 1, 21)  # of AWQ
TEXTS = 128  # windows of WINDOW tokens

Matrix = np.ndarray  # rows [outputs, inputs], or second moments of the inputs [inputs, inputs]
Quantizer = Callable[[Matrix, Matrix, np.random.Generator], Matrix]


def nearest(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    return INT4.quantize(rows)


def other(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    return replace(INT4, block=2 * BLOCK).quantize(rows)


def gptq(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    """With the inverse's Cholesky factor, column by column, in the given order."""
    left, done = rows.astype(np.float64), np.zeros_like(rows)
    second = moments + DAMPING * np.mean(np.diag(moments)) * np.eye(len(moments))
    factor = np.linalg.cholesky(np.linalg.inv(second)).T
    for start in range(0, left.shape[1], BLOCK):
        block = left[:, start : start + BLOCK].astype(np.float32)
        scale = INT4.scale(block)
        for k in range(start, start + block.shape[1]):
            units = np.divide(
                left[:, k : k + 1], scale, where=scale != 0, out=np.zeros(scale.shape)
            )
            code = np.searchsorted(INT4.boundaries, units)
            done[:, k] = (INT4.levels[code] * scale)[:, 0]
            error = (left[:, k] - done[:, k]) / factor[k, k]
            left[:, k:] -= np.outer(error, factor[k, k:])
    return done


def gptq_onnxruntime(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    return onnxruntimes(rows.T.astype(np.float64), moments.copy(), 4, BLOCK, "asym").T


def awq(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    size = np.sqrt(np.diag(moments))
    size = np.maximum(size, 1e-4 * size.max())  # inputs that are always 0

    def scaled(alpha: float) -> Matrix:
        by = (size**alpha / np.sqrt((size**alpha).max() * (size**alpha).min())).astype(np.float32)
        return INT4.quantize(rows * by) / by

    def lost(found: Matrix) -> float:
        return float(np.sum(((found - rows) @ moments) * (found - rows)))

    return min(map(scaled, ALPHAS), key=lost)


def rotation(rows: Matrix, moments: Matrix, rng: np.random.Generator) -> Matrix:
    turned = np.linalg.qr(rng.standard_normal((rows.shape[1],) * 2))[0].astype(np.float32)
    return INT4.quantize(rows @ turned) @ turned.T


QUANTIZERS: dict[str, Quantizer] = {
    "nearest": nearest,
    "other": other,
    "gptq": gptq,
    "gptq-ort": gptq_onnxruntime,
    "awq": awq,
    "rotation": rotation,
}


def inputs(kind: str) -> np.ndarray:
    """Of a victim: images, or windows of tokens."""
    if kind != "lm":
        with np.load(FOLDER / "digits-test.npz") as data:
            return data["pixels"]
    ids = prompts.encode((FOLDER / "lm-held-out.txt").read_text())
    return ids[: TEXTS * WINDOW].reshape(-1, WINDOW)


def moments(model: onnx.ModelProto, given: np.ndarray) -> dict[str, Matrix]:
    """By weight: the mean of x x^T over what it is multiplied with, [inputs, inputs]."""
    tapped = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in model.graph.input}
    kinds = weight_layouts(model)
    read = {
        node.input[1]: node.input[0]
        for node in model.graph.node
        if len(node.input) > 1 and kinds.get(node.input[1]) in ("rows", "transposed")
    }
    taps = list(dict.fromkeys(name for name in read.values() if name not in known))
    tapped.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in taps)
    run = session(tapped)
    fed = run.get_inputs()[0].name
    found = dict(zip(taps, run.run(taps, {fed: given}), strict=True)) | {fed: given}
    values = {name: found[value] for name, value in read.items()}
    flat = {name: x.reshape(-1, x.shape[-1]).astype(np.float64) for name, x in values.items()}
    return {name: x.T @ x / len(x) for name, x in flat.items()}


def handed_on(model: Path, quantizer: Quantizer, given: np.ndarray, seed: int) -> onnx.ModelProto:
    """The model with every matrix as the quantizer leaves it, and nearest rounding elsewhere."""
    original = in_float32(onnx.load(model))
    plain, found = quantized(original, "int4"), moments(original, given)
    rng = np.random.default_rng(seed)
    layouts, changed = weight_layouts(original), {}
    for tensor in original.graph.initializer:
        if tensor.name in found:
            value = numpy_helper.to_array(tensor)
            rows = value if layouts[tensor.name] == "rows" else np.ascontiguousarray(value.T)
            rows = quantizer(rows, found[tensor.name], rng)
            rows = rows if layouts[tensor.name] == "rows" else rows.T
            changed[tensor.name] = np.ascontiguousarray(rows, np.float32)
    for tensor in plain.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
    return plain


@dataclass(frozen=True)
class Row:
    """One quantized model. given: one of GIVEN. utility: accuracy or perplexity."""

    model: str
    attacker: str
    quantizer: str
    given: str
    seed: int
    attack: float
    utility: float
    float_attack: float
    float_utility: float

    @property
    def kept(self) -> float:
        """Of the float model's utility: perplexities, which are above 1, divide the other way."""
        share = self.utility / self.float_utility
        return 1 / share if self.float_utility > 1 else share


def measure(entry: dict, quantizers: Sequence[str], seeds: int) -> Iterator[Row]:
    """Rows of a manifest entry. Of what is not guarded, only what draws is repeated."""
    source = FOLDER / entry["file"]
    before, given = rates(source, entry), inputs(entry["architecture"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = dict(zip(GIVEN, (source, folder / "m.onnx", folder / "d.onnx"), strict=True))
        for seed in range(seeds):
            Case(source, "int4", folder).guard(files["moved"], seed=seed, emit="float")
            onnx.save(quantized(onnx.load(files["moved"]), "int4"), files["decoded"])
            for what, quantizer in product(GIVEN, quantizers):
                if seed and what == GIVEN[0] and quantizer != "rotation":
                    continue
                after = rates(handed_on(files[what], QUANTIZERS[quantizer], given, seed), entry)
                said = (entry["name"], entry["attacker"], quantizer, what, seed)
                yield Row(*said, *_pair(after), *_pair(before))


def _pair(found: dict) -> tuple[float, float]:
    return found["attack"], found["accuracy" if "accuracy" in found else "perplexity"]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per model and quantizer; then one per quantizer."""
    lines, means = [], []
    for model, quantizer in dict.fromkeys((row.model, row.quantizer) for row in rows):
        mine = [row for row in rows if (row.model, row.quantizer) == (model, quantizer)]
        before = f"{mine[0].float_attack:.3f} / {mine[0].float_utility:.3f}"
        cells = [_cell([row for row in mine if row.given == given]) for given in GIVEN]
        lines.append([model, before, quantizer, *cells])
    for quantizer in dict.fromkeys(row.quantizer for row in rows):
        mine = [r for r in rows if r.quantizer == quantizer and r.attacker != "clean"]
        cells = [_mean([row for row in mine if row.given == given]) for given in GIVEN]
        means.append([quantizer, *cells])
    head = ("model", "float", "quantizer", *GIVEN)
    return f"{markdown(head, lines)}\n\n{markdown(head[2:], means)}"


def _cell(drawn: Sequence[Row]) -> str:
    attacks = [row.attack for row in drawn]
    worst = f" [{max(attacks):.3f}]" if len(drawn) > 1 else ""
    return f"{np.mean(attacks):.3f}{worst} / {np.mean([row.utility for row in drawn]):.3f}"


def _mean(drawn: Sequence[Row]) -> str:
    """Every model counts once, however often it was drawn."""
    if not drawn:
        return ""
    of_model = [[r for r in drawn if r.model == name] for name in {r.model for r in drawn}]
    attack = np.mean([np.mean([row.attack for row in mine]) for mine in of_model])
    kept = np.mean([np.mean([row.kept for row in mine]) for mine in of_model])
    return f"{attack:.3f} [{max(row.attack for row in drawn):.3f}] / {kept:.1%}"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    manifest = {e["name"]: e for e in json.loads((FOLDER / "manifest.json").read_text())}
    parser.add_argument("--models", nargs="+", default=MODELS, choices=manifest, metavar="NAME")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--seeds", type=int, default=3, help="draws of what is random (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of the rows")
    parser.add_argument("--load", nargs="+", type=Path, metavar="FILE", help="of earlier runs")
    options = parser.parse_args(given)
    rows = [Row(**row) for file in options.load or () for row in json.loads(file.read_text())]
    for name in () if options.load else options.models:
        rows += measure(manifest[name], options.quantizers, options.seeds)
        print(name, file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
