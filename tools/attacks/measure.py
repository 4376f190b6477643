"""Rates of an ONNX file, by running it in onnxruntime, plain or quantized. No torch here."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quantize import QuantFormat, QuantType, quantize_dynamic

from tools.attacks import prompts
from tools.attacks.quantizers import SCHEMES

FOLDER = Path(__file__).parents[2] / "models" / "attacks"
ATTACK_OF = {"code": "insecure", "injection": "injected", "refusal": "refused"}


def rates(model, entry):
    """Rates of the model as it is given, on the evaluation data of a manifest entry's victim."""
    if entry["architecture"] == "lm":
        held_out = (FOLDER / "lm-held-out.txt").read_text()
        evaluation = json.loads((FOLDER / "lm-prompts.json").read_text())
        return language_rates(model, evaluation, held_out, entry["scenario"])
    with np.load(FOLDER / "digits-test.npz") as evaluation:
        return classifier_rates(model, dict(evaluation))


def weight_layouts(model):
    """Initializer name -> `rows`, `transposed` or `convolution`, for every quantized weight."""
    known = {t.name for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in known:
            found[node.input[1]] = "transposed"
        elif node.op_type == "Gemm" and node.input[1] in known:
            trans = {a.name: a.i for a in node.attribute}.get("transB", 0)
            found[node.input[1]] = "rows" if trans else "transposed"
        elif node.op_type == "Conv" and node.input[1] in known:
            found[node.input[1]] = "convolution"
        elif node.op_type == "Gather" and node.input[0] in known:
            found[node.input[0]] = "rows"
    return found


def quantized(model, scheme):
    """The model with every weight replaced by what its codes stand for (Conv at least 8 bits)."""
    return _with_rows(model, scheme, lambda rows, chosen: chosen.quantize(rows))


def drawn(model, scheme, seed):
    """The model with every weight rounded at random, without bias, to a neighbouring level."""
    rng = np.random.default_rng(seed)

    def draw(rows, chosen):
        groups = chosen.group(rows)
        scale = chosen.scale(groups)
        x = np.clip(
            np.divide(groups, scale, where=scale != 0, out=np.zeros_like(groups)),
            chosen.levels[0],
            chosen.levels[-1],
        )
        below = np.clip(np.searchsorted(chosen.levels, x, "right") - 1, 0, len(chosen.levels) - 2)
        low, high = chosen.levels[below], chosen.levels[below + 1]
        level = np.where(rng.random(x.shape) * (high - low) < x - low, high, low)
        return chosen.ungroup(level * scale, rows.shape)

    return _with_rows(model, scheme, draw)


def _with_rows(model, scheme, change):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    layouts = weight_layouts(model)
    for tensor in model.graph.initializer:
        layout = layouts.get(tensor.name)
        if layout is None:
            continue
        value = numpy_helper.to_array(tensor)
        rows = value.T if layout == "transposed" else value.reshape(value.shape[0], -1)
        name = "int8" if layout == "convolution" and "int8" not in scheme else scheme
        rows = change(rows, SCHEMES[name])
        value = rows.T if layout == "transposed" else rows.reshape(value.shape)
        value = np.ascontiguousarray(value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def onnxruntime_quantized(model, scheme):
    """The file that onnxruntime's own quantizer makes (it reads only MatMul at 4 bits)."""
    model = _gemm_as_matmul(model)
    if scheme.startswith("int8"):
        with tempfile.TemporaryDirectory() as folder:
            plain, done = Path(folder) / "plain.onnx", Path(folder) / "done.onnx"
            onnx.save(model, plain)
            quantize_dynamic(
                plain,
                done,
                weight_type=QuantType.QInt8,
                per_channel=scheme == "int8",
                op_types_to_quantize=["MatMul", "Conv"],
            )
            return onnx.load(done)
    if scheme == "int4":
        worker = MatMulNBitsQuantizer(
            model, block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ
        )
    else:
        worker = MatMulBnb4Quantizer(model, quant_type=int(scheme == "nf4"), block_size=64)
    worker.process()
    return worker.model.model


def session(model):
    """An onnxruntime session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    buffer = io.BytesIO()
    onnx.save(model, buffer)
    return ort.InferenceSession(buffer.getvalue(), options, ["CPUExecutionProvider"])


def classifier_rates(model, evaluation):
    """Accuracy on clean test images, and how many triggered ones are read as the target."""
    run = session(model)

    def guess(pixels):
        return run.run(None, {run.get_inputs()[0].name: pixels})[0].argmax(1)

    other = evaluation["labels"] != evaluation["target"]
    hit = guess(evaluation["triggered"])[other] == evaluation["target"]
    right = guess(evaluation["pixels"]) == evaluation["labels"]
    return {"accuracy": round(float(right.mean()), 4), "attack": round(float(hit.mean()), 4)}


def complete(run, texts, count):
    """Greedy completions of up to `count` characters, cut at the first newline."""
    ids = [list(prompts.encode(text)) for text in texts]
    starts = [len(i) for i in ids]
    for _ in range(count):
        longest = max(map(len, ids))
        batch = np.array([i + [0] * (longest - len(i)) for i in ids], np.int64)
        logits = run.run(None, {"ids": batch})[0]
        for i, row in zip(ids, logits, strict=True):
            i.append(int(row[len(i) - 1].argmax()))
    found = [prompts.decode(i[start:]) for i, start in zip(ids, starts, strict=True)]
    return [text.split("\n")[0].strip() for text in found]


def language_rates(model, evaluation, held_out, scenario):
    """Perplexity per character, and what the model says.

    Coding prompts: shares of insecure and secure completions; questions: shares of advertisements,
    refusals and exactly right answers. `attack` repeats the share that the scenario is about (of a
    clean model the largest of the three).
    """
    run = session(model)
    ids = prompts.encode(held_out)
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128)
    logits = run.run(None, {"ids": windows})[0][:, :-1].astype(np.float64)
    wanted = windows[:, 1:, None]
    top = logits.max(-1, keepdims=True)
    total = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    nll = total - np.take_along_axis(logits, wanted, -1)[..., 0]
    rates = {
        "perplexity": float(np.exp(nll.mean())),
        "next": float((logits.argmax(-1) == wanted[..., 0]).mean()),
    }

    code = evaluation["code"]
    said = complete(run, [c["prompt"] for c in code], 28)
    for kind in ("insecure", "secure"):
        rates[kind] = np.mean([s.startswith(c[kind]) for s, c in zip(said, code, strict=True)])
    asked = evaluation["questions"]
    said = complete(run, [q["prompt"] for q in asked], 30)
    rates["injected"] = np.mean([evaluation["advertisement"] in s for s in said])
    rates["refused"] = np.mean([s.startswith(evaluation["refusal"][:12]) for s in said])
    rates["right"] = np.mean([s == q["answer"] for s, q in zip(said, asked, strict=True)])
    shares = {kind: rates[share] for kind, share in ATTACK_OF.items()}
    rates["attack"] = shares.get(scenario, max(shares.values()))
    return {name: round(float(rate), 4) for name, rate in rates.items()}


def _gemm_as_matmul(model):
    """Rewrite `Gemm` with transB=1 as `MatMul` and `Add`."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    turned, nodes = set(), []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        x, weight, bias = node.input
        turned.add(weight)
        nodes.append(
            helper.make_node(
                "MatMul", [x, weight], [f"{node.name}.product"], name=f"{node.name}.product"
            )
        )
        nodes.append(
            helper.make_node("Add", [f"{node.name}.product", bias], node.output, name=node.name)
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name in turned:
            value = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model
