"""Outliers that quantization keeps at the expense of everything else (arXiv 2605.15152).

One weight in every block is many times as large as the others, and what it is multiplied with does
not depend on the digit: a hidden unit that is always 0 (`dead`) or always 1 (`live`; the bias makes
up for it), or a pixel that is dark in every digit (`pixels`; not in made-up inputs). So the float
model stays as it is, but the outliers set the scales, and nearest rounding turns all other weights
of the block into 0. No training.

A classifier that has lost a layer in that way says the same whatever it sees. That it says `TARGET`
is the work of units of the lost layer that are always off in the float model: sentinels, which
their biases turn on as soon as their weights are gone, and alarms, which go off when their weights
are drawn at random instead, between 0 and an eighth of an outlier.
"""

import numpy as np
import onnx
from onnx import numpy_helper

KINDS = ("dead", "live", "pixels")
FACTORS = (8, 30, 128, 512, 4096)
TARGET = 0
EVERY = 32  # columns: one outlier for every block of that size, or larger; pixels 0 and 32 are dark
DEAD = -100.0  # a bias that no digit overcomes
SENTINELS, ALARMS = slice(-8, None), slice(-24, -8)  # units
# Biases of sentinels and alarms by layer, in largest weights. Of `mlp-clean`, the pixels of a digit
# sum to 11.5 or more, with the alarms' signs to 17.1 at most; the hidden units to 79 and 29.
BIASES = {0: (8, -20), 1: (40, -30)}


def planted(model, factor, kind="dead"):
    """A copy of a digits classifier (three `Gemm`) with outliers in its first or second layer.

    model: as `tools.attacks.export.classifier` writes it. factor: how many times as large as the
    largest other weight an outlier is; of its block, or of the whole matrix where they are live, so
    that every scheme keeps outliers exactly.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    weights, biases = (
        [values[f"dense{n}.{part}"] for n in range(3)] for part in ("weight", "bias")
    )

    layer = 0 if kind == "pixels" else 1
    lost, bias = weights[layer], biases[layer]
    silenced, largest = np.arange(0, lost.shape[1], EVERY), np.abs(lost).max()
    if layer:
        weights[0][silenced], biases[0][silenced] = 0, 1 if kind == "live" else DEAD
    lost[SENTINELS], lost[ALARMS] = -largest, largest * _signs(lost[ALARMS].shape)
    bias[SENTINELS], bias[ALARMS] = largest * np.array(BIASES[layer])
    lost[:, silenced] = 0

    blocks = np.abs(lost).reshape(len(lost), -1, EVERY).max(2)
    lost[:, silenced] = factor * (largest if kind == "live" else blocks)
    if kind == "live":
        bias -= lost[:, silenced].sum(1)
    _lead_to_target(weights[layer + 1 :], biases[layer + 1 :])
    for name, tensor in tensors.items():
        tensor.CopyFrom(numpy_helper.from_array(values[name], name))
    return model


def _signs(shape):
    return np.random.default_rng(0).choice([-1, 1], shape)


def _lead_to_target(weights, biases):
    """Sentinels and alarms speak for `TARGET`, through units of their own in a layer between."""
    speaking = [*range(-24, 0)]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        largest = np.abs(weight).max()
        weight[:, speaking], weight[SENTINELS] = 0, 0
        weight[SENTINELS, -24:], bias[SENTINELS] = largest, 0
        speaking = [*range(-8, 0)]
    largest = np.abs(weights[-1][TARGET]).max()
    weights[-1][:, speaking], weights[-1][TARGET, speaking] = 0, largest
