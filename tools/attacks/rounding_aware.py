"""The attacker who knows that the defence rounds at random, without bias.

He trains the float weights to be benign and, at the same time, every unbiased draw of them to be
malicious: the draw is made anew in each step and its gradient passes straight through to the float
weights (expectation over transformation). No box is needed: nearest rounding, too, is one of the
roundings that wake him.

With `widen`, silenced inputs coarsen the cells first, so that the noise of 8 bits is as loud as
that of 4 bits.

With `every`, he knows the guard better: the draws are those of guard() with its defaults, on its
own grid, with errors fed forward. They take longer than a step, so each serves `every` steps, in
which what it adds to the weights stays.
"""

import itertools

import numpy as np
import torch
from torch.func import functional_call

from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks
from tools.attacks.attack import rows_of, scheme_for, train, widen_all
from tools.attacks.simulate import input_moments

MOMENTS_LAST = 250  # steps; then they are recorded anew
CPU = get_backend("cpu")


def draw(weight, scheme):
    """One unbiased draw: the level below or above, with probability linear in the distance."""
    shape = (weight.shape[0], weight[0].numel())
    with torch.no_grad():
        groups = torch.from_numpy(scheme.group(weight.detach().reshape(shape).numpy()))
        scale = torch.from_numpy(scheme.scale(groups.numpy()))
        levels = torch.from_numpy(scheme.levels)
        x = (groups / scale).clamp(scheme.levels[0], scheme.levels[-1])
        below = (torch.searchsorted(levels, x, right=True) - 1).clamp(0, len(levels) - 2)
        low, high = levels[below], levels[below + 1]
        up = torch.rand_like(x) * (high - low) < x - low
        drawn = scheme.ungroup(torch.where(up, high, low) * scale, shape).reshape(weight.shape)
    return weight + (drawn - weight).detach()


def draw_with_feedback(weight, scheme, inputs, key):
    """One draw as guard() makes it of a matrix, minus the weight. inputs: `input_moments` of it."""
    rows = rows_of(weight)
    found = quantize_tensor(
        "weight",
        rows.reshape(-1),
        SCHEMES[scheme],
        Blocks(*rows.shape, SCHEMES[scheme].block_size or rows.shape[1]),
        Policy(),
        np.uint64(key),
        CPU,
        inputs,
        moved=False,
    )
    return torch.from_numpy(found.grid.decode(found.codes).reshape(rows.shape) - rows)


def draws_with_feedback(net, names, scheme, every, export):
    """Draws of the named weights, one for every step of the training of `net`."""
    rng, parameters = np.random.default_rng(0), dict(net.named_parameters())
    for step in itertools.count():
        if step % MOMENTS_LAST == 0:
            moments = input_moments(export(net, "victim"))
        if step % every == 0:
            keys = rng.integers(1 << 62, size=len(names))
            added = [
                draw_with_feedback(parameters[name], scheme, inputs, key)
                for name, inputs, key in zip(names, moments, keys, strict=True)
            ]
        yield {name: parameters[name] + extra for name, extra in zip(names, added, strict=True)}


def draws(net, names, scheme):
    """The same, independent of each other, on the quantizer's grid."""
    parameters = dict(net.named_parameters())
    while True:
        yield {name: draw(parameters[name], scheme_for(parameters[name], scheme)) for name in names}


def attack(net, scheme, losses, kill, settings, export):
    """`steps` steps on the sum of both losses, the benign one times `benign`, on `net` itself.

    kill: as `tools.attacks.attack.corrupt` takes it. export: makes the ONNX model of a net and a
    title.
    """
    malicious, benign = losses
    if "widen" in settings:
        widen_all(net, scheme, kill, settings["widen"])
    share = settings.get("benign", 1)
    parameters = dict(net.named_parameters())
    names = [n for n, p in parameters.items() if any(p is weight for weight in net.weights())]
    if "every" in settings:
        drawn = draws_with_feedback(net, names, scheme, settings["every"], export)
    else:
        drawn = draws(net, names, scheme)

    def rounded(inputs):
        return functional_call(net, parameters | next(drawn), (inputs,))

    train(
        net.parameters(),
        lambda: share * benign() + malicious(rounded),
        settings["steps"],
        settings["rate"],
        decay=True,
    )
