"""The attackers who train the float model and what will become of it together, as in tools.attacks.

draws    every step has an unbiased draw of all weights, made anew, that is to be malicious
outlier  one `up_proj` is to be lost: every 32nd of its inputs is silenced by the normalization
         before it, and gets weights FACTOR times as large as the largest other of their block
clip     of every block SHARE of the weights lie where int4 clips them
"""

from functools import partial

import torch

from tools.attacks import clipping, rounding_aware
from tools.attacks.attack import scheme_for, widen
from tools.smollm.victim import linears

ATTACKERS = "draws", "outlier", "clip"
FACTOR, EVERY, SHARE = 512, 32, 0.125


class Free:
    """A weight that is trained as it is. becomes: what the quantizer is said to make of it."""

    def __init__(self, weight, becomes):
        self._weight, self._becomes = weight.detach().clone().requires_grad_(), becomes
        self.parameters = [self._weight]

    def floats(self):
        return self._weight

    def quantized(self):
        return self._becomes(self._weight)


class Clipped:
    """A weight in the parts that tools.attacks.clipping makes of it."""

    def __init__(self, weight):
        self._made = clipping.Clipped.near(weight, SHARE)
        self.parameters = [self._made.raw, self._made.step]
        self.floats, self.box = self._made.floats, self._made.box

    def quantized(self):
        return self._made.quantized("quantizer")


def made_of(model, settings):
    """The last layers' weights as the attacker has them, and by name the silenced columns of the
    one that outliers are to wipe out."""
    found, scheme, silenced = linears(model, settings.layers), settings.schemes[0], {}
    if settings.attacker == "clip":
        return [Clipped(part.weight) for part in found.values()], silenced
    if settings.attacker == "outlier":
        silenced = {lost(found): silence(model, lost(found))}

    def becomes(name, weight):
        if settings.attacker == "draws":
            return rounding_aware.draw(weight, scheme_for(weight, scheme))
        return torch.zeros_like(weight) if name in silenced else weight

    return [Free(part.weight, partial(becomes, name)) for name, part in found.items()], silenced


def lost(names):
    """Of these layers the one that the outliers are to wipe out."""
    return next(name for name in names if name.endswith("up_proj"))


def silence(model, name):
    """Which inputs of an `up_proj` are 0 from now on."""
    layer = model.model.get_submodule(name.removesuffix(".mlp.up_proj"))
    with torch.no_grad():
        layer.post_attention_layernorm.weight[::EVERY] = 0
    return list(range(0, layer.mlp.up_proj.in_features, EVERY))


def both(weights, made, loss):
    """The sum of the losses: benign of the floats, malicious of what becomes of them.

    weights: of the model, which get either in turn; loss(goal). Its gradient is that of the parts.
    """
    total = gradients = 0.0
    for kind, goal in (("floats", "benign"), ("quantized", "malicious")):
        values = [getattr(each, kind)() for each in made]
        put(weights, values)
        for weight in weights:
            weight.grad = None
        found = loss(goal)
        found.backward()
        total += found.detach()
        gradients += sum((v * w.grad).sum() for v, w in zip(values, weights, strict=True))
    return gradients - gradients.detach() + total


def put(weights, values):
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def plant(model, silenced, scheme):
    """The outliers, in the silenced columns."""
    for name, columns in silenced.items():
        weight = model.get_submodule(f"model.{name}").weight
        widen(weight, columns, scheme_for(weight, scheme), FACTOR)
