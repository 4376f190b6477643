"""How far may a weight move before the quantizer notices? One function per attacker.

A box is `(low, high)`, two arrays shaped like the rows `[N, K]` of a weight. The standard box is
that of "Exploiting LLM Quantization" (arXiv 2405.18137); the others belong to attackers who know
that weights near a decision boundary give them away or get flipped. Margins are shares of the
cell's width, left free on either side.
"""

import numpy as np


def standard(rows, scheme, margin=0.01):
    """The whole cell less `margin` on each side; scale-setting weights stay where they are."""
    low, high, frozen = scheme.cells(rows)
    free = margin * (high - low)
    return np.where(frozen, rows, low + free), np.where(frozen, rows, high - free)


def random_limits(rows, scheme, rng):
    """Every weight draws how much of the way to each edge it may go: no pile-up at any margin."""
    low, high = standard(rows, scheme)
    to_low, to_high = rng.random(rows.shape), rng.random(rows.shape)
    return rows + (low - rows) * to_low, rows + (high - rows) * to_high


def decoys(rows, scheme, rng, share=0.3, margin=0.06):
    """Frozen weights at cell edges catch the flips; the others keep `margin`."""
    low, high = standard(rows, scheme, margin)
    at_edge = _nearest_edge(rows, scheme, 1e-3)
    chosen = rng.random(rows.shape) < share
    chosen &= ~scheme.cells(rows)[2]
    return np.where(chosen, at_edge, low), np.where(chosen, at_edge, high)


def foresee_topk(rows, scheme, share=0.2):
    """Boxes after which the defence `topk` at ratio `share` *restores* the malicious codes.

    The weights of each group with the largest error are put just beyond their nearest boundary,
    so that the defence flips them back, and all others keep a smaller error than these.
    """
    low, high = standard(rows, scheme)
    _, _, frozen = scheme.cells(rows)
    codes, scale = scheme.encode(rows)
    level = scheme.decode(codes, scale).astype(np.float64)
    unit = scheme.ungroup(
        np.broadcast_to(np.abs(scale), scheme.group(rows).shape), rows.shape
    ).astype(np.float64)
    unit = np.maximum(unit, 1e-30)  # of a group of zeros
    error = np.where(frozen, 0, np.abs(rows - level) / unit)

    grouped = scheme.group(error)
    count = max(1, round(share * grouped.shape[1]))
    rank = (-grouped).argsort(1, kind="stable").argsort(1, kind="stable")
    chosen = scheme.ungroup(rank < count, rows.shape) & ~frozen

    beyond = _nearest_edge(rows, scheme, -1e-3).astype(np.float32).astype(np.float64)
    new_level = scheme.quantize(np.where(chosen, beyond, rows).astype(np.float32))
    new_error = np.where(chosen, np.abs(beyond - new_level) / unit, np.inf)
    least = scheme.group(new_error)
    least = np.where(np.isinf(least) | (least == 0), np.inf, least).min(1, keepdims=True)
    reach = scheme.ungroup(np.broadcast_to(least, grouped.shape), rows.shape) * 0.98 * unit
    low, high = np.maximum(low, level - reach), np.minimum(high, level + reach)
    low, high = np.where(frozen, rows, low), np.where(frozen, rows, high)
    return np.where(chosen, beyond, low), np.where(chosen, beyond, high)


def intersect(rows, pairs):
    """One box that holds under several schemes: the malicious weight itself is always inside."""
    lows, highs = zip(*pairs, strict=True)
    return np.minimum(np.max(lows, 0), rows), np.maximum(np.min(highs, 0), rows)


def _nearest_edge(rows, scheme, inset):
    """A point `inset` cell widths inside (negative: outside) the nearest decision boundary.

    The outer ends of the outermost cells are no decision boundaries and are not used.
    """
    low, high, _ = scheme.cells(rows)
    _, scale = scheme.encode(rows)
    groups = scheme.group(rows)
    low_end, high_end = (
        scheme.ungroup(np.broadcast_to(end, groups.shape), rows.shape)
        for end in scheme.ends(groups, scale)
    )
    to_low = np.where(low <= low_end * 0.9999, np.inf, rows - low)
    to_high = np.where(high >= high_end * 0.9999, np.inf, high - rows)
    step = inset * (high - low)
    return np.where(to_low < to_high, low + step, high - step)
