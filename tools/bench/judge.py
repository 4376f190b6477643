"""What must hold of guard() with its defaults, and what it falls short of."""

from tools.bench.defences import OURS
from tools.bench.rows import Cell, Table, best_topk

ATTACK_SLACK = 0.02  # above the float model's rate, for every single draw
ATTACKED_KEPT = {8: 0.985, 4: 0.98}  # of the float model's utility, mean of the draws, by bits
CLEAN_KEPT = {8: 0.999, 4: 0.985}  # of plain quantization's utility, mean of the draws, by bits
ATTACKED_GOAL = 0.99  # less is a shortfall
CLEAN_GOAL = 1.0


def failures(table: Table) -> list[str]:
    """One line for each model and scheme where the defaults do not do what they must.

    The attack rate is judged draw by draw, the utility by the mean of the draws. Attacks that are
    not strong, and attacks on the rounding itself at 4 bits, are not judged. One test image more
    or less is no difference.
    """
    lines = []
    for (model, scheme), defences in table.items():
        if OURS not in defences:
            continue
        ours = defences[OURS]
        if ours.first.attacker == "clean":
            allowed = CLEAN_KEPT[ours.first.bits]
            found = _utility(ours, defences["none"].mean("utility"), "plain", allowed)
        elif ours.first.judged:
            found = _attacked(ours)
        else:
            found = []
        lines += [f"{model}, {scheme}: {line}" for line in found]
    return lines


def outdone(table: Table) -> str:
    """On how many judged attacks a topk, chosen with hindsight, has the larger DER, and why."""
    judged = [d for d in table.values() if OURS in d and d[OURS].first.judged]
    pairs = [(d[OURS], rival) for d in judged if (rival := best_topk(d))]
    lost = [(ours, rival) for ours, rival in pairs if ours.mean("der") < rival.mean("der")]
    barred = sum(rival.mean("der") > ours.first.ceiling for ours, rival in lost)
    return (
        f"best topk has the larger DER on {len(lost)} of {len(pairs)} attacks: on {barred} of them "
        "a larger one than an unbiased draw between neighbouring levels has at the float model's "
        f"own rates, on {len(lost) - barred} a draw could have won"
    )


def shortfalls(table: Table) -> list[str]:
    """One line for each model and scheme where the defaults could do better.

    Clean models: where they keep less than plain quantization's utility. Attacked ones: where they
    keep less than ATTACKED_GOAL of the float model's, and where a topk, chosen with hindsight, has
    a larger DER than the mean of their draws (given also at no price per modified weight, and with
    the most that an unbiased draw can have).
    """
    lines = []
    for (model, scheme), defences in table.items():
        ours, rival = defences.get(OURS), best_topk(defences)
        if not ours:
            continue
        if ours.first.attacker == "clean":
            found = _utility(ours, defences["none"].mean("utility"), "plain", CLEAN_GOAL)
        elif ours.first.judged:
            found = _utility(ours, ours.first.float_utility, "float", ATTACKED_GOAL)
            if rival and ours.mean("der") < rival.mean("der"):
                found.append(
                    f"DER {ours.mean('der'):.3f}, {rival.first.defence} {rival.mean('der'):.3f}, "
                    f"at most {ours.first.ceiling:.3f}; "
                    f"without the price {ours.mean('bare'):.3f}, {rival.mean('bare'):.3f}; "
                    f"modified {ours.mean('modified'):.1%}, {rival.mean('modified'):.1%}"
                )
        else:
            found = []
        lines += [f"{model}, {scheme}: {line}" for line in found]
    return lines


def _utility(ours: Cell, reference: float, name: str, allowed: float) -> list[str]:
    """A line if the mean utility is less than `allowed` of the reference, by more than an image."""
    kept, images = ours.kept(reference), ours.first.images
    if kept >= allowed - (1 / (images * reference) if images else 0) - 1e-9:
        return []
    utility = ours.mean("utility")
    return [f"utility {utility:.4f}, {name} {reference:.4f}: {kept:.2%}, least {allowed:.2%}"]


def _attacked(ours: Cell) -> list[str]:
    before, limit = ours.first.float_attack, ours.first.float_attack + ATTACK_SLACK
    lines = [
        f"seed {row.seed}: attack {row.attack:.4f}, float {before:.4f}, most {limit:.4f}; "
        f"95 % interval of {row.asked} answers {low:.4f} to {high:.4f}"
        for row in ours.rows
        for low, high in [row.interval]
        if row.attack > limit + 1e-9
    ]
    allowed = ATTACKED_KEPT[ours.first.bits]
    return lines + _utility(ours, ours.first.float_utility, "float", allowed)
