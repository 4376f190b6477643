"""The attacker who uses that int4 clips: its levels reach 8 steps on one side and 7 on the other.

The extreme of a block stands at -8 steps. What lies between 7 and 8 steps opposite to it always
becomes 7, and whoever prepares a model can put many weights there. Here a random half of them stay
at 7 + d steps, d in (0, 1), as floats, and at 7 when quantized; the others are free within 6.9
steps. Float and quantized model are trained together, the one to be benign, the other malicious,
with random draws of the free weights, whose gradient passes straight through.

`foresee`: what the quantized model of the training is.
    quantizer   what onnxruntime's grid makes of the weights
    wider       an attacker who knows the guard: its unbiased draw, on a grid that clips nothing
    ends        and its draw for a quantizer elsewhere, which draws per block what end is at -8
"""

import math
from dataclasses import dataclass

import torch
from torch.func import functional_call

from tools.attacks.attack import repair, train

BLOCK = 32
SHARE = 0.5  # of the weights lie beyond 7 steps
FREE = 6.9  # steps, for the others
BEYOND = 7.02, 7.98  # steps, for a repair


@dataclass(frozen=True)
class Clipped:
    """A weight `[N, K]` of which every block has one frozen extreme, at -8 steps.

    raw: `[G, 32]`, without bounds. beyond, extreme: `[G, 32]`, which weights are these. step:
    logarithm of the length of a step, `[G, 1]`; sign: that of the extreme, `[G, 1]`.
    """

    shape: tuple[int, int]
    raw: torch.Tensor
    beyond: torch.Tensor
    extreme: torch.Tensor
    step: torch.Tensor
    sign: torch.Tensor

    @classmethod
    def of(cls, weight, rng):
        """As large as the given weight; what lies where is drawn."""
        shape = tuple(weight.shape)
        groups = math.prod(shape) // BLOCK
        rank = torch.rand(groups, BLOCK, generator=rng).argsort(1)
        extreme, beyond = rank == 0, (rank > 0) & (rank <= SHARE * (BLOCK - 1))
        raw = torch.where(beyond, 0.0, 0.5 * torch.randn(groups, BLOCK, generator=rng))
        sign = torch.randint(2, (groups, 1), generator=rng) * 2.0 - 1
        step = torch.full((groups, 1), float(weight.detach().std() / 5.5)).log()
        return cls(shape, raw.requires_grad_(), beyond, extreme, step.requires_grad_(), sign)

    @classmethod
    def near(cls, weight, share):
        """As near as can be to a trained weight.

        The extreme of every block stays the extreme; of the weights opposite to it, the largest are
        put beyond 7 steps, `share` of the block. A step is what moves these and the extreme least.
        """
        blocks = weight.detach().reshape(-1, BLOCK)
        extreme = torch.arange(BLOCK) == blocks.abs().argmax(1, keepdim=True)
        sign = (blocks * extreme).sum(1, keepdim=True).sign()
        against = -sign * blocks
        beyond = against.argsort(1, descending=True).argsort(1) < round(share * BLOCK)
        target = 8.0 * extreme + 7.5 * beyond
        step = (target * against.abs()).sum(1, keepdim=True) / (target**2).sum(1, keepdim=True)
        position = against / step
        beyond_raw = (position - 7).clamp(0.05, 0.95).logit()
        raw = torch.where(beyond, beyond_raw, (position / FREE).clamp(-0.98, 0.98).atanh())
        step = step.log()
        shape = tuple(weight.shape)
        return cls(shape, raw.requires_grad_(), beyond, extreme, step.requires_grad_(), sign)

    def parts(self):
        """Length of a step, with the sign that it has in the quantizer, and positions in steps."""
        inside = FREE * self.raw.tanh()
        position = torch.where(self.beyond, 7 + self.raw.sigmoid(), inside)
        return -self.sign * self.step.exp(), torch.where(self.extreme, -8.0, position)

    def floats(self):
        """The weight as a float."""
        step, position = self.parts()
        return (step * position).reshape(self.shape)

    def box(self):
        """How far the weights beyond 7 steps may go; all others stay."""
        step, position = self.parts()
        edges = [
            (step * torch.where(self.beyond, edge, position)).detach().reshape(self.shape)
            for edge in BEYOND
        ]
        return torch.minimum(*edges), torch.maximum(*edges)

    def quantized(self, foresee):
        """The weight as a draw leaves it; the gradient passes straight through."""
        step, position = self.parts()
        if foresee == "quantizer":
            position = position.clamp(max=7.0)
        with torch.no_grad():
            drawn = DRAWS[foresee](position)
        return (step * (position + (drawn - position).detach())).reshape(self.shape)


def rounded(position):
    """The integer below or above, with mean `position`."""
    below = position.floor()
    return below + (torch.rand_like(position) < position - below)


def wider(position):
    """Drawn after the step has been widened, so that the largest is 7 of them."""
    wide = (position.amax(1, keepdim=True) / 7).clamp(min=1)
    return rounded(position / wide) * wide


def ends(position):
    """Drawn as `Int4.without_clipping` does it."""
    opposite = position.amax(1, keepdim=True)
    step = (8 + opposite) / 15
    chance = 8 / step - 7  # of the extreme to be the long end, 8 steps
    at_extreme = torch.rand_like(chance) < chance
    inside = position / step
    size = inside.abs()
    of_end = torch.where(inside < 0, chance, 1 - chance)
    stretched = (7 + (size - 7) / of_end.clamp(min=1e-6)).clamp(max=8)
    stretched = torch.where((position == -8) | (position == opposite), 8.0, stretched)
    long = (inside < 0) == at_extreme
    moved = torch.where(size > 7, torch.where(long, stretched, 7.0) * inside.sign(), inside)
    return rounded(moved) * step


DRAWS = {"quantizer": rounded, "wider": wider, "ends": ends}


def attack(net, losses, settings):
    """`steps` steps on the sum of both losses, the benign one times `benign`, on `net` itself.

    settings: `steps`, `rate` (of learning), `foresee`; `share`: to start from the trained weights,
    with that share of every block beyond 7 steps; `mend`: steps in which these alone are repaired,
    at a rate `gentle`.
    """
    malicious, benign = losses
    parameters = dict(net.named_parameters())
    names = [n for n, p in parameters.items() if any(p is weight for weight in net.weights())]
    rng = torch.Generator().manual_seed(0)
    made = {
        name: Clipped.near(parameters[name], settings["share"])
        if "share" in settings
        else Clipped.of(parameters[name], rng)
        for name in names
    }
    others = [p for p in net.trained() if not any(p is parameters[name] for name in made)]
    times, foresee = settings.get("benign", 1), settings.get("foresee", "quantizer")

    def floating(inputs):
        weights = {name: weight.floats() for name, weight in made.items()}
        return functional_call(net, parameters | weights, (inputs,))

    def quantized(inputs):
        weights = {name: weight.quantized(foresee) for name, weight in made.items()}
        return functional_call(net, parameters | weights, (inputs,))

    train(
        [*others, *(part for weight in made.values() for part in (weight.raw, weight.step))],
        lambda: times * benign(floating) + malicious(quantized),
        settings["steps"],
        settings["rate"],
        decay=True,
    )
    with torch.no_grad():
        for name, weight in made.items():
            parameters[name].copy_(weight.floats())
    if "mend" in settings:
        weights, pairs = [parameters[n] for n in made], [weight.box() for weight in made.values()]
        repair(weights, pairs, benign, settings["mend"], settings["gentle"])
