"""Outliers as in `outlier`, for any victim: what quantization leaves of it is trained.

Some matrices will be lost: the inputs that `kill` silences get weights `factor` times as large as
the largest other weight of their block, which becomes 0 with all others when it is quantized. The
float model is trained to be benign, and at the same time to be malicious without these matrices.
"""

import torch
from torch.func import functional_call

from tools.attacks.attack import scheme_for, train, widen


def attack(net, losses, kill, settings):
    """`steps` steps on the sum of both losses, on `net` itself; then the outliers.

    kill: as `tools.attacks.attack.corrupt` takes it. settings: `steps`, `rate` (of learning),
    `lost` (how the names of the weights end that are to be lost), `factor` (see `planted`).
    """
    malicious, benign = losses
    parameters = dict(net.named_parameters())
    lost = {name: p for name, p in parameters.items() if name.endswith(settings["lost"])}
    dead = dict(zip(net.weights(), kill(net), strict=True))
    for weight, columns in dead.items():  # what is 0 on either side stays so
        widen(weight, columns, scheme_for(weight, "int4"), 0)
    nothing = {name: torch.zeros_like(weight) for name, weight in lost.items()}

    def quantized(inputs):
        return functional_call(net, parameters | nothing, (inputs,))

    train(
        net.trained(),
        lambda: benign() + malicious(quantized),
        settings["steps"],
        settings["rate"],
        decay=True,
    )
    for weight in lost.values():
        widen(weight, dead[weight], scheme_for(weight, "int4"), settings["factor"])
