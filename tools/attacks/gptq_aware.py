"""The attacker who foresees GPTQ: error feedback on samples that he has, too, rounded to nearest.

Column k of a weight is rounded not from w_k but from w_k + sum over j < k of e_j A_jk, where
e = w - (what its code stands for) and A comes from the inputs of the layer (`feedback` of the
package). So the malicious codes come out wherever u = e (I + A) lies in the cells, box by box: a
box again, in other coordinates, and the repair descends on u. What he finds rests on A, and so on
the layers before; at the end the layers are settled one after the other.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call

from tools.attacks.attack import assign, clamp, corrupt, descend, rows_of, scheme_for
from tools.attacks.export import classifier
from tools.attacks.simulate import input_moments

MARGIN = 0.05  # of a cell's width: A is not known to the last digit
ROUNDS = 2  # of repair, before the layers are settled


@dataclass(frozen=True)
class Cells:
    """Of the malicious weight, rows `[N, K]`: what its codes stand for, how far from that u may be.

    frozen: weights that set a scale; they stay, and no other may become as large as `top`.
    """

    levels: np.ndarray
    low: np.ndarray
    high: np.ndarray
    frozen: np.ndarray
    top: np.ndarray

    @classmethod
    def of(cls, rows, scheme):
        low, high, frozen = scheme.cells(rows)
        levels, free = scheme.quantize(rows).astype(np.float64), MARGIN * (high - low)
        low, high = low + free - levels, high - free - levels
        largest = np.abs(scheme.group(rows)).max(1, keepdims=True)
        top = scheme.ungroup(np.broadcast_to(largest, scheme.group(rows).shape), rows.shape)
        low, high = (
            np.where(frozen, 0, edge) for edge in (np.minimum(low, 0), np.maximum(high, 0))
        )
        return cls(levels, low, high, frozen, 0.999 * top)

    def settled(self, rows, order, weave):
        """Rows that GPTQ takes to these codes, near the given ones. weave: A^T, by `order`."""
        errors, given = np.zeros_like(self.levels), rows - self.levels
        least, most = -self.top - self.levels, self.top - self.levels
        for k, column in enumerate(order):
            due = errors[:, order[:k]] @ weave[k, :k]
            fed = np.clip(given[:, column] + due, self.low[:, column], self.high[:, column])
            free = np.clip(fed - due, least[:, column], most[:, column])
            errors[:, column] = np.where(self.frozen[:, column], given[:, column], free)
        return self.levels + errors


def attack(net, scheme, samples, losses, kill, settings):
    """All stages, on `net` itself; `samples` are those that GPTQ will be given.

    The rest as `tools.attacks.attack.attack` takes it.
    """
    malicious, benign = losses
    corrupt(net, scheme, "gptq", malicious, kill, settings)
    weights = net.weights()
    cells = [Cells.of(rows_of(w).copy(), scheme_for(w, scheme)) for w in weights]
    for _ in range(ROUNDS):
        repair(net, weights, cells, weaves(net, samples), benign, settings)
    for number, weight in enumerate(weights):
        known = weaves(net, samples)[number:]
        repair(net, weights[number:], cells[number:], known, benign, settings)
        assign(weight, cells[number].settled(rows_of(weight), *known[0]))


def repair(net, weights, cells, weaves, benign, settings):
    """Descend on u, inside the boxes."""
    names = [n for n, p in net.named_parameters() if any(p is weight for weight in weights)]
    moved, pairs, maps = [], [], []
    for weight, cell, (order, weave) in zip(weights, cells, weaves, strict=True):
        free = torch.from_numpy(~cell.frozen[:, order]).double()
        mixing = torch.from_numpy(weave.T) * free[:, :, None] * free[:, None, :]
        mixing += torch.eye(len(order), dtype=torch.float64)
        eye = torch.eye(len(order), dtype=torch.float64).expand_as(mixing)
        errors = torch.from_numpy(rows_of(weight) - cell.levels)[:, order] * free
        moved.append((errors[:, None] @ mixing)[:, 0].float().requires_grad_())
        pairs.append([torch.from_numpy(edge[:, order]).float() for edge in (cell.low, cell.high)])
        inverse = torch.linalg.solve_triangular(mixing, eye, upper=True).float()
        maps.append((inverse, torch.from_numpy(np.argsort(order)), torch.from_numpy(cell.levels)))

    def parameters():
        errors = [
            (u[:, None] @ inverse)[:, 0][:, back]
            for u, (inverse, back, _) in zip(moved, maps, strict=True)
        ]
        rows = [levels.float() + e for e, (*_, levels) in zip(errors, maps, strict=True)]
        return dict(zip(names, rows, strict=True))

    fixed = dict(net.named_parameters())

    def loss():
        return benign(lambda inputs: functional_call(net, fixed | parameters(), (inputs,)))

    for _ in descend(moved, loss, settings["repair"], settings["rate"], decay=True):
        clamp(moved, pairs)
    for weight, rows in zip(weights, parameters().values(), strict=True):
        assign(weight, rows.detach().numpy())


def weaves(net, samples):
    """Order of the columns and A^T of every weight, as GPTQ will have them."""
    known = input_moments(classifier(net, "victim"), samples)
    pairs = [inputs.factors[0] for inputs in known]
    return [(order[0], weave[0].astype(np.float64)) for order, weave in pairs]
