"""Defences that are given 1,000 real samples: EFRAP, GPTQ, and ours; and QVec. Needs torch.

EFRAP (arXiv 2405.12725) learns, layer by layer, which weights take the neighbouring level instead
of the nearest. With f in 0..1 the share of the way to the neighbour, it minimises
    mean squared change of the layer's products
    + sum |w - nearest| * -log f            the larger the error, the more a flip is wanted
    + 0.01 * sum (1 - (2 f - 1)^2)          f goes to 0 or 1
and flips where f >= 0.5. The terms, their weights and the start (f where the float weight is) are
those of its authors' code, which runs 10,000 steps of Adam at 1e-3 over batches of 32. Here: the
expectation over all inputs, from their second moments, for 1,000 steps at 1e-2; the levels of any
scheme. Embeddings, which have no products, stay at the nearest level.

QVec (arXiv 2606.20254) needs no samples: it subtracts `alpha` times the change that quantization
makes, w - alpha (Q(w) - w), and rounds the result to nearest.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from flipguard_onnx.calibration.weight_inputs import WeightInput, weight_input
from flipguard_onnx.graph.weights import Weight
from flipguard_onnx.pipeline.options import GuardOptions
from flipguard_onnx.pipeline.plan import WeightPlan
from flipguard_onnx.quantization.kernels import get_backend
from tools.attacks import digits, prompts
from tools.attacks.digits import SAMPLES, TOGETHER
from tools.attacks.measure import WINDOW, session
from tools.attacks.simulate import NEAREST, as_data
from tools.bench.defences import DEFENCES, Case, Defence, guarded, replaced

STEPS, RATE = 1000, 1e-2
ROUNDNESS = 0.01
ALPHAS = (0.25, 0.5, 1.0)
ROWS = 8192  # of the inputs of one batch


@cache
def samples(kind: str) -> np.ndarray:
    """Real inputs of a victim, [batches, TOGETHER, ...]: what it was trained on."""
    if kind != "lm":
        return digits.samples()
    ids = prompts.encode(prompts.corpus()[0])
    starts = np.random.default_rng(0).choice(len(ids) - WINDOW, SAMPLES, replace=False)
    return np.stack([ids[start : start + WINDOW] for start in starts]).reshape(-1, TOGETHER, WINDOW)


def _given(case: Case) -> Path:
    """The samples as guard() takes them."""
    return as_data(samples(case.kind), onnx.load(case.model), case.folder)


def _with_data(case: Case, target: Path, seed: int, **options) -> int:
    return guarded(case, target, seed, preserve="data", data=_given(case), **options)


def _efrap(case: Case, target: Path, seed: int) -> int:
    moved = {}
    for weight, moments in _moments(case):
        values = weight.canonical(case.weights[weight.name])
        crossed = weight.canonical(case.crossed[weight.name])
        flips = efrap(values.astype(np.float32), *_levels(case, weight), moments)
        moved[weight.name] = weight.stored(np.where(flips, crossed, values))
    case.guard(target, replaced(case.model, moved), policy="none")
    return case.changed(target)


def _qvec(case: Case, target: Path, seed: int, alpha: float) -> int:
    moved = {}
    for weight in case.found:
        values = case.weights[weight.name]
        nearest = weight.stored(_levels(case, weight)[0])
        against = values - alpha * (nearest - values.astype(np.float32))
        moved[weight.name] = against.astype(values.dtype)
    case.guard(target, replaced(case.model, moved), policy="none")
    return case.changed(target)


def _levels(case: Case, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of every weight, and the next nearest."""
    plan = WeightPlan.of(weight, GuardOptions(**case.options))
    scheme, blocks = plan.scheme, plan.blocks
    values, backend = weight.canonical(case.weights[weight.name]), get_backend("cpu")
    floats = values.astype(np.float32)
    grid = scheme.fit(floats, blocks, values.dtype, backend)
    margins = grid.analyze(floats, backend)
    return grid.decode(margins.codes), grid.decode(margins.neighbours)


def _moments(case: Case) -> Iterator[tuple[Weight, np.ndarray]]:
    """Weights that have inputs, with the mean of x x^T over these, [columns, columns]."""
    model = onnx.load(case.model)
    taps = {w.name: weight_input(w.uses[0], w, [w.scope.body]) for w in case.found}
    read = [weight for weight in case.found if isinstance(taps[weight.name], WeightInput)]
    names = list(dict.fromkeys(taps[weight.name].value for weight in read))
    known = {value.name for value in model.graph.input}
    for name in names:
        if name not in known:
            model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    run, rng = session(model), np.random.default_rng(0)
    fed = run.get_inputs()[0].name
    recorded = [name for name in names if name not in known]
    sums = {weight.name: 0.0 for weight in read}
    count = dict.fromkeys(sums, 0)
    for batch in samples(case.kind):
        found = dict(zip(recorded, run.run(recorded, {fed: batch}), strict=True)) | {fed: batch}
        for weight in read:
            rows = taps[weight.name].rows(found[taps[weight.name].value], ROWS, rng)[0]
            sums[weight.name] = sums[weight.name] + rows.T.astype(np.float64) @ rows
            count[weight.name] += len(rows)
    for weight in read:
        yield weight, sums[weight.name] / count[weight.name]


def efrap(
    weights: np.ndarray, nearest: np.ndarray, other: np.ndarray, moments: np.ndarray
) -> np.ndarray:
    """Which of the flat weights [n] are flipped. moments: mean of x x^T, [columns, columns]."""
    w, near, far = (
        torch.from_numpy(a.reshape(-1, len(moments)).astype(np.float32))
        for a in (weights, nearest, other)
    )
    second = torch.from_numpy(moments.astype(np.float32))
    movable = (far != near) & (w != near)
    gap = torch.where(movable, far - near, 1.0)
    start = torch.where(movable, (w - near) / gap, 0.5).clamp(1e-4, 1 - 1e-4)
    logit = torch.logit(start).requires_grad_()
    error = torch.where(movable, (w - near).abs(), 0.0)
    optimizer = torch.optim.Adam([logit], RATE)
    for _ in range(STEPS):
        share = torch.sigmoid(logit)
        change = w - near - torch.where(movable, share * gap, 0.0)
        loss = ((change @ second) * change).sum()
        loss = loss - (error * torch.log(share + 1e-8)).sum()
        loss = loss + ROUNDNESS * (1 - (2 * share - 1) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((logit >= 0) & movable).numpy().reshape(-1)


RIVALS = {
    "none": DEFENCES["none"],
    "noise-box": DEFENCES["noise-box"],
    "noise-2-boxes": DEFENCES["noise-2-boxes"],
    **{f"qvec-{alpha:g}": Defence(partial(_qvec, alpha=alpha), draws=False) for alpha in ALPHAS},
    "efrap": Defence(_efrap, draws=False),
    "gptq": Defence(partial(_with_data, tau=NEAREST), draws=False),
    "unbiased": DEFENCES["unbiased"],
    "ours": DEFENCES["ours"],
    "ours + data": Defence(_with_data),
}
