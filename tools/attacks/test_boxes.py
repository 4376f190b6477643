"""Does every box keep what its attacker promises? Needs numpy only."""

import numpy as np
import pytest

from tools.attacks import boxes
from tools.attacks.quantizers import SCHEMES

SHAPE = (24, 128)


def attackers(rng):
    """All boxes that must keep every code as it was."""
    return {
        "standard": boxes.standard,
        "margin": lambda rows, scheme: boxes.standard(rows, scheme, 0.25),
        "random": lambda rows, scheme: boxes.random_limits(rows, scheme, rng),
        "decoys": lambda rows, scheme: boxes.decoys(rows, scheme, rng),
    }


def inside(box, rng):
    """A random point of a box, its edges included."""
    low, high = (edge.astype(np.float32) for edge in box)
    share = np.clip(rng.uniform(-0.2, 1.2, low.shape), 0, 1).astype(np.float32)
    return np.clip(low + (high - low) * share, low, high)


@pytest.mark.parametrize("attacker", attackers(None))
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_stay(name, attacker):
    rng, scheme = np.random.default_rng(0), SCHEMES[name]
    rows = rng.standard_normal(SHAPE).astype(np.float32)
    codes, scale = scheme.encode(rows)
    moved = inside(attackers(rng)[attacker](rows, scheme), rng)
    np.testing.assert_array_equal(scheme.encode(moved)[0], codes)
    np.testing.assert_array_equal(scheme.encode(moved)[1], scale)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "mxfp4"])
def test_topk_restores_the_codes(name):
    """Flip the largest errors as the defence does: the malicious codes come back.

    Not at mxfp4, where the largest errors are those of weights beyond the last level.
    """
    rng, scheme, share = np.random.default_rng(1), SCHEMES[name], 0.2
    rows = rng.standard_normal(SHAPE).astype(np.float32)
    codes, _ = scheme.encode(rows)
    moved = inside(boxes.foresee_topk(rows, scheme, share), rng)
    found, scale = scheme.encode(moved)
    assert (found != codes).mean() > 0.15

    x, at = scheme.group(moved) / scale, scheme.group(found)
    error = np.abs(x - scheme.levels[at])
    order = (-error).argsort(1)[:, : round(share * error.shape[1])]
    flipped = np.zeros_like(error, bool)
    np.put_along_axis(flipped, order, True, 1)
    neighbour = at + np.where(x > scheme.levels[at], 1, -1)
    after = scheme.ungroup(np.where(flipped, neighbour, at), SHAPE)
    assert (after != codes).mean() < 0.02


def test_intersection_keeps_all_codes():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal(SHAPE).astype(np.float32)
    names = ["int4", "nf4", "fp4"]
    moved = inside(boxes.intersect(rows, [boxes.standard(rows, SCHEMES[n]) for n in names]), rng)
    for name in names:
        codes = SCHEMES[name].encode(rows)[0]
        np.testing.assert_array_equal(SCHEMES[name].encode(moved)[0], codes)
