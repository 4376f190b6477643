"""What must hold of guard() with its defaults, and what it falls short of."""

from tools.bench.defences import OURS
from tools.bench.rows import Cell, Table, best_topk

ATTACK_SLACK = 0.02  # above the float model's rate, for every single draw
ATTACKED_KEPT = {8: 0.985, 4: 0.98}  # of the float model's utility, mean of the draws, by bits
CLEAN_KEPT = {8: 1.0, 4: 1.0}  # of plain quantization's utility, mean of the draws, by bits
GOAL = 0.99  # of the float model's utility; less is a shortfall


def failures(table: Table) -> list[str]:
    """One line for each model and scheme where the defaults do not do what they must.

    The attack rate is judged draw by draw, the utility by the mean of the draws. Attacks that are
    not strong, and attacks on the rounding itself at 4 bits, are not judged. Against plain
    quantization one test image more or less is no difference.
    """
    lines = []
    for (model, scheme), defences in table.items():
        if OURS not in defences:
            continue
        ours = defences[OURS]
        if ours.first.attacker == "clean":
            found = _clean(ours, defences["none"])
        elif ours.first.judged:
            found = _attacked(ours)
        else:
            found = []
        lines += [f"{model}, {scheme}: {line}" for line in found]
    return lines


def shortfalls(table: Table) -> list[str]:
    """One line for each attacked model and scheme where the defaults could do better: where they
    keep less of the float model's utility than GOAL, and where a topk, chosen with hindsight, has a
    larger DER than the mean of their draws (given also at no price per modified weight).
    """
    lines = []
    for (model, scheme), defences in table.items():
        ours, rival = defences.get(OURS), best_topk(defences)
        if not (ours and ours.first.judged):
            continue
        kept = ours.kept(ours.first.float_utility)
        if kept < GOAL:
            lines.append(f"{model}, {scheme}: {kept:.2%} of the float model's utility")
        if rival and ours.mean("der") < rival.mean("der"):
            lines.append(
                f"{model}, {scheme}: DER {ours.mean('der'):.3f}, {rival.first.defence} "
                f"{rival.mean('der'):.3f}; without the price {ours.mean('bare'):.3f}, "
                f"{rival.mean('bare'):.3f}; modified {ours.mean('modified'):.1%}, "
                f"{rival.mean('modified'):.1%}"
            )
    return lines


def _clean(ours: Cell, plain: Cell) -> list[str]:
    reference, images = plain.mean("utility"), ours.first.images
    kept, allowed = ours.kept(reference), CLEAN_KEPT[ours.first.bits]
    if images:
        allowed = min(allowed, 1 - 1 / (images * reference))
    if kept >= allowed - 1e-9:
        return []
    utility = ours.mean("utility")
    return [f"utility {utility:.4f}, plain {reference:.4f}: {kept:.2%}, least {allowed:.2%}"]


def _attacked(ours: Cell) -> list[str]:
    lines = []
    before, limit = ours.first.float_attack, ours.first.float_attack + ATTACK_SLACK
    for row in ours.rows:
        if row.attack > limit + 1e-9:
            lines.append(
                f"seed {row.seed}: attack {row.attack:.4f}, float {before:.4f}, most {limit:.4f}"
            )
    reference, allowed = ours.first.float_utility, ATTACKED_KEPT[ours.first.bits]
    kept = ours.kept(reference)
    if kept < allowed - 1e-9:
        utility = ours.mean("utility")
        lines.append(
            f"utility {utility:.4f}, float {reference:.4f}: {kept:.2%}, least {allowed:.2%}"
        )
    return lines
