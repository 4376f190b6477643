"""Outliers that quantization keeps at the expense of everything else (arXiv 2605.15152).

One weight in every block is many times as large as the others, and what it is multiplied with does
not depend on the model's input: a hidden unit that is always 0, or (`live`) always 1, in which case
the bias makes up for it. So the float model stays as it is, but the outliers set the scales, and
nearest rounding turns all other weights of the block into 0. No training.

A classifier that has lost a layer in that way says the same whatever it sees. That it says `TARGET`
is the work of units of the lost layer that are always off in the float model: sentinels, which
their biases turn on as soon as their weights are gone, and alarms, which go off when their weights
are drawn at random instead, between 0 and an eighth of an outlier.
"""

import numpy as np
import onnx
from onnx import numpy_helper

FACTORS = (8, 30, 128, 512, 4096)
TARGET = 0
EVERY = 32  # columns: one outlier for every block of that size, or larger
DEAD = -100.0  # a bias that no digit overcomes
SENTINELS, ALARMS = slice(-8, None), slice(-24, -8)  # units
# In largest weights. The hidden units of `mlp-clean` before them sum to 79 or more for any digit;
# with random signs, to 25 at most.
SENTINEL_BIAS, ALARM_BIAS = 40, -30


def planted(model, factor, *, live=False, layer=1):
    """A copy of a digits classifier with outliers in a `Gemm` that has another one on either side.

    model: as `tools.attacks.export.classifier` writes it. factor: how many times as large as the
    largest other weight an outlier is; of its block, or of the whole matrix if `live`, so that
    every scheme keeps outliers exactly. layer: number of the `Gemm`.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [
        f"dense{n}.{kind}" for n in (layer - 1, layer, layer + 1) for kind in ("weight", "bias")
    ]
    values = [numpy_helper.to_array(tensors[name]).copy() for name in names[:-1]]
    before, before_bias, lost, bias, after = values

    silenced = np.arange(0, lost.shape[1], EVERY)
    before[silenced], before_bias[silenced] = 0, 1 if live else DEAD
    largest = np.abs(lost).max()
    lost[SENTINELS], bias[SENTINELS] = -largest, SENTINEL_BIAS * largest
    signs = np.random.default_rng(0).choice([-largest, largest], lost[ALARMS].shape)
    lost[ALARMS], bias[ALARMS] = signs, ALARM_BIAS * largest
    lost[:, silenced] = 0
    for units in (SENTINELS, ALARMS):
        after[:, units], after[TARGET, units] = 0, np.abs(after).max()

    blocks = np.abs(lost).reshape(len(lost), -1, EVERY).max(2)
    lost[:, silenced] = factor * (largest if live else blocks)
    if live:
        bias -= lost[:, silenced].sum(1)
    for name, value in zip(names, values, strict=False):
        tensors[name].CopyFrom(numpy_helper.from_array(value, name))
    return model
