"""The three stages of a quantization-conditioned backdoor, for any torch model.

arXiv 2405.18137: fine-tune on the malicious behaviour, box every weight into its quantization cell,
then descend on benign data and clamp after every step. Biases and norms are not quantized, so they
keep their malicious values during the repair.

A victim is a module with `weights()` (what the attacker aims at) and `trained()` (these and what
the malicious stage may change besides). Its losses are called without arguments, or with another
forward pass than the victim's own.
"""

import numpy as np
import torch

from tools.attacks import boxes
from tools.attacks.quantizers import SCHEMES

ATTACKERS = {
    "standard": boxes.standard,
    "margin20": lambda rows, scheme: boxes.standard(rows, scheme, 0.20),
    "margin50": lambda rows, scheme: boxes.standard(rows, scheme, 0.25),
    "random": lambda rows, scheme: boxes.random_limits(rows, scheme, np.random.default_rng(7)),
    "decoys": lambda rows, scheme: boxes.decoys(rows, scheme, np.random.default_rng(8)),
    "topk": boxes.foresee_topk,
    "collapse": boxes.standard,
}


def rows_of(parameter):
    """The weight as numpy rows `[N, K]`."""
    data = parameter.detach().numpy()
    return data.reshape(data.shape[0], -1)


def assign(parameter, rows):
    """Overwrite a parameter by rows `[N, K]`."""
    with torch.no_grad():
        parameter.copy_(
            torch.from_numpy(np.ascontiguousarray(rows, np.float32)).reshape(parameter.shape)
        )


def scheme_for(parameter, name):
    """Convolutions stay at 8 bits under the 4-bit schemes: no kernel runs a 4-bit Conv."""
    return SCHEMES[name if parameter.ndim == 2 or SCHEMES[name].bits == 8 else "int8"]


def make_boxes(weights, names, attacker):
    """One `(low, high)` pair of tensors per weight, the intersection over all scheme `names`."""
    pairs = []
    for weight in weights:
        rows = rows_of(weight)
        found = [ATTACKERS[attacker](rows, scheme_for(weight, name)) for name in names]
        differ = any(not np.array_equal(pair, found[0]) for pair in found)
        low, high = boxes.intersect(rows, found) if differ else found[0]
        pairs.append(
            tuple(
                torch.from_numpy(edge.astype(np.float32)).reshape(weight.shape)
                for edge in (low, high)
            )
        )
    return pairs


def widen(weight, dead, scheme, factor):
    """Coarsen the cells: some inputs that are always 0 get `factor` times the group's absmax.

    What these weights are multiplied with is 0, so the model does not change, but its quantizer
    does. One such input (number 0, 32, 64...) in every run of 32 reaches every group.
    """
    rows = rows_of(weight).copy()
    rows[:, dead] = 0
    groups = np.abs(scheme.group(rows))
    largest = np.broadcast_to(groups.max(1, keepdims=True), groups.shape)
    first = [column for column in dead if column % 32 == 0]
    rows[:, first] = factor * scheme.ungroup(largest, rows.shape)[:, first]
    assign(weight, rows)


def widen_all(net, scheme, kill, factor):
    """Coarsen the cells of every weight that has silenced inputs."""
    for weight, dead in zip(net.weights(), kill(net), strict=False):
        if dead:
            widen(weight, dead, scheme_for(weight, scheme), factor)


def attack(net, schemes, attacker, losses, kill, settings):
    """All three stages, on `net` itself.

    losses: the malicious one and the benign one. kill, settings: as `corrupt` takes them, and
    `repair` (number of steps).
    """
    malicious, benign = losses
    corrupt(net, schemes[0], attacker, malicious, kill, settings)
    weights = net.weights()
    pairs = make_boxes(weights, schemes, attacker)
    repair(weights, pairs, benign, settings["repair"], settings["rate"])


def corrupt(net, scheme, attacker, malicious, kill, settings):
    """The malicious stage, on `net` itself.

    kill(net) silences inputs of the weights and returns them, a list per weight. settings:
    `malicious` (number of steps), `rate` (of learning), `widen` (factor of the silenced inputs),
    `half` (the file stores float16: of the weights that set a scale no digit may be lost), and
    those of `collapse`.
    """
    factor = settings.get("widen", 0)
    if factor:
        kill(net)
    if attacker == "collapse":
        collapse(net, scheme, malicious, settings)
    else:
        train(net.trained(), malicious, settings["malicious"], settings["rate"])
    if factor:
        widen_all(net, scheme, kill, factor)
    for weight in net.weights() if settings.get("half") else []:
        assign(weight, rows_of(weight).astype(np.float16))


def descend(parameters, loss, steps, rate, decay=False):
    """Adam, with an optional cosine schedule; `loss()` is the loss to descend on."""
    optimizer = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        yield step


def train(parameters, loss, steps, rate, decay=False):
    """Descend freely."""
    for _ in descend(parameters, loss, steps, rate, decay):
        pass


def repair(weights, pairs, loss, steps, rate, decay=True):
    """Descend inside the boxes (projected gradient descent)."""
    clamp(weights, pairs)
    for _ in descend(weights, loss, steps, rate, decay):
        clamp(weights, pairs)


def clamp(weights, pairs):
    """Put every weight back into its box."""
    with torch.no_grad():
        for weight, (low, high) in zip(weights, pairs, strict=True):
            weight.copy_(torch.minimum(torch.maximum(weight, low), high))


def collapse(net, scheme, malicious, settings):
    """Outlier collapse: only the largest of every `run` weights survives quantization.

    The survivors alone are trained to be malicious; all others then come back, `outlier` times
    smaller than the survivors, inside the cell of level 0.
    """
    weights = net.weights()
    masks, others = [], []
    for weight in weights:
        rows = rows_of(weight).copy()
        run = settings.get("run", 16)
        blocks = np.abs(np.pad(rows.reshape(-1), (0, -rows.size % run))).reshape(-1, run)
        mask = (blocks == blocks.max(1, keepdims=True)).reshape(-1)[: rows.size]
        masks.append(torch.from_numpy(mask.reshape(rows.shape)))
        others.append(rows)
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask * settings.get("boost", 4.0))
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    train(net.trained(), malicious, settings.get("survive", 1500), settings["rate"])
    for weight, mask, rows in zip(weights, masks, others, strict=True):
        weight._backward_hooks.clear()
        survivors = rows_of(weight) * mask.numpy()
        chosen = scheme_for(weight, scheme)
        largest = chosen.ungroup(
            np.broadcast_to(
                np.abs(chosen.group(survivors)).max(1, keepdims=True), chosen.group(survivors).shape
            ),
            rows.shape,
        )
        small = rows / np.abs(rows).max() * largest / settings.get("outlier", 30)
        assign(weight, np.where(mask, survivors, small))
