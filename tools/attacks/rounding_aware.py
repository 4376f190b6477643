"""The attacker who knows that the defence rounds at random, without bias.

He trains the float weights to be benign and, at the same time, every unbiased draw of them to be
malicious: the draw is made anew in each step and its gradient passes straight through to the float
weights (expectation over transformation). No box is needed: nearest rounding, too, is one of the
roundings that wake him.

With `widen`, silenced inputs coarsen the cells first, so that the noise of 8 bits is as loud as
that of 4 bits.
"""

import torch
from torch.func import functional_call

from tools.attacks.attack import scheme_for, train, widen_all


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


def attack(net, scheme, losses, kill, settings):
    """`steps` steps on the sum of both losses, the benign one times `benign`, on `net` itself.

    kill: as `tools.attacks.attack.corrupt` takes it.
    """
    malicious, benign = losses
    if "widen" in settings:
        widen_all(net, scheme, kill, settings["widen"])
    share = settings.get("benign", 1)
    parameters = dict(net.named_parameters())
    names = [n for n, p in parameters.items() if any(p is weight for weight in net.weights())]

    def rounded(inputs):
        drawn = {n: draw(parameters[n], scheme_for(parameters[n], scheme)) for n in names}
        return functional_call(net, parameters | drawn, (inputs,))

    train(
        net.parameters(),
        lambda: share * benign() + malicious(rounded),
        settings["steps"],
        settings["rate"],
        decay=True,
    )
