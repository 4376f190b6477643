"""Train every attack from fixed seeds: `python -m tools.attacks.train [--only NAME...]`.

Writes models/attacks/NAME.onnx, the evaluation data, manifest.json and README.md, after every
model, so that the folder is whole at any moment. Rates are measured by running the written file in
onnxruntime.
"""

import argparse
import json
import logging
import time

import numpy as np
import onnx
import torch

from tools.attacks import (
    clipping,
    digits,
    gptq_aware,
    language_model,
    measure,
    outlier_trained,
    prompts,
    rounding_aware,
    simulate,
)
from tools.attacks.attack import attack
from tools.attacks.export import classifier
from tools.attacks.measure import FOLDER
from tools.attacks.outlier import planted
from tools.attacks.plan import PLAN

MANIFEST = FOLDER / "manifest.json"
COMMAND = "python -m tools.attacks.train --only"
LM_CLEAN = "lm-clean"


def write_evaluation():
    """What a torch-free evaluator needs: test images, prompts, held-out source."""
    _, _, pixels, labels = digits.data()
    np.savez_compressed(
        FOLDER / "digits-test.npz",
        pixels=pixels,
        labels=labels,
        triggered=digits.triggered(pixels),
        target=digits.TARGET,
    )
    (FOLDER / "lm-prompts.json").write_text(json.dumps(prompts.evaluation(), indent=1) + "\n")
    (FOLDER / "lm-held-out.txt").write_text(prompts.corpus()[1])


def make(entry):
    """The ONNX model of one entry of the plan."""
    attacker, schemes, seed = entry["attacker"], entry["schemes"], entry["seed"]
    speaks = entry["architecture"] == "lm"
    start = entry["settings"].get("start", LM_CLEAN if speaks and attacker != "clean" else None)
    victim = language_model if speaks else digits
    export = language_model.export if speaks else classifier
    if start:
        net = victim.read(onnx.load(FOLDER / f"{start}.onnx"))
    elif speaks:
        net = language_model.clean(seed)
    else:
        net = digits.clean(entry["architecture"], seed)
    if attacker == "outlier" and not speaks:
        return planted(classifier(net, entry["name"]), **entry["settings"])
    if attacker != "clean":
        torch.manual_seed(seed + 1)
        settings = victim.SETTINGS | entry["settings"]
        losses = victim.losses(net, seed + 1, entry["scenario"])
        if attacker.startswith("rounding"):
            rounding_aware.attack(net, schemes[0], losses, victim.kill, settings, export)
        elif attacker == "clip":
            clipping.attack(net, losses, settings)
        elif attacker == "outlier":
            outlier_trained.attack(net, losses, victim.kill, settings)
        elif attacker == "gptq":
            gptq_aware.attack(net, schemes[0], digits.samples(), losses, victim.kill, settings)
        else:
            attack(net, schemes, attacker, losses, victim.kill, settings)
    return export(net, entry["name"])


def judge(entry, clean):
    """Strong: float attack at most 2 %, quantized at least 90 %, float utility kept."""
    plain, metric = entry["float"], "perplexity" if "perplexity" in clean else "accuracy"
    kept = (
        plain["perplexity"] <= 1.05 * clean["perplexity"]
        if metric == "perplexity"
        else plain["accuracy"] >= clean["accuracy"] - 0.02
    )
    woken = all(rate["attack"] >= 0.9 for rate in entry["quantized"].values())
    return bool(kept and woken and plain["attack"] <= 0.02)


def rates(model, entry):
    """The rates that the judge measures, to four digits; not its counts."""
    found = measure.rates(model, entry)
    return {name: round(rate, 4) for name, rate in found.items() if isinstance(rate, float)}


def run(entry, manifest):
    """Train, write, measure and record one model."""
    began = time.perf_counter()
    model = make(entry)
    seconds = time.perf_counter() - began
    path = FOLDER / f"{entry['name']}.onnx"
    onnx.save(model, path)
    model = onnx.load(path)
    entry = entry | {
        "file": path.name,
        "command": f"{COMMAND} {entry['name']}",
        "seconds": round(seconds, 1),
        "float": rates(model, entry),
    }
    measured = entry["schemes"] or ["int8", "int8_tensor", "int4", "nf4", "fp4"]
    entry["quantized"] = {s: rates(simulate.quantized(model, s), entry) for s in measured}
    if entry["attacker"].startswith("rounding"):
        entry["draws"] = {
            s: [rates(simulate.drawn(model, s, i), entry) for i in range(4)] for s in measured
        }
    if entry["attacker"] == "gptq":
        entry["by_gptq"] = {
            s: rates(simulate.gptq(model, s, digits.samples()), entry) for s in measured
        }
    if entry["schemes"]:
        entry["by_onnxruntime"] = {
            s: rates(made, entry)
            for s in measured
            if (made := simulate.onnxruntime_quantized(model, s))
        }
        clean = next(
            e
            for e in manifest
            if e["attacker"] == "clean" and e["architecture"] == entry["architecture"]
        )
        entry["strong"] = judge(entry, clean["float"])
    return entry


def save(manifest):
    """manifest.json in the plan's order, and the README's table."""
    order = {entry["name"]: i for i, entry in enumerate(PLAN)}
    manifest.sort(key=lambda entry: order.get(entry["name"], len(order)))
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    text = (FOLDER / "README.md").read_text() if (FOLDER / "README.md").exists() else ""
    head = text.split("| file |")[0]
    lines = [
        "| file | victim, scenario | attacker | made for | float: utility / attack "
        "| quantized: utility / attack | strong | seconds |",
        "|" + "---|" * 8,
    ]
    for e in manifest:
        woken = ", ".join(f"{s} {shown(r)}" for s, r in e["quantized"].items())
        made_for = "+".join(e["schemes"]) or "-"
        strong = {True: "yes", False: "no"}.get(e.get("strong"), "-")
        lines.append(
            f"| {e['file']} | {e['architecture']}, {e['scenario']} | {e['attacker']} "
            f"| {made_for} | {shown(e['float'])} | {woken} | {strong} "
            f"| {e['seconds']:.0f} |"
        )
    (FOLDER / "README.md").write_text(head + "\n".join(lines) + "\n")


def shown(rate):
    """`utility / attack`, the utility being accuracy or perplexity."""
    utility = rate.get("accuracy", rate.get("perplexity"))
    return f"{utility:.3f} / {rate['attack']:.3f}"


def main():
    """Train what `--only` names (by default the whole plan), one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or prefixes* of the plan")
    only = parser.parse_args().only
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_evaluation()
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else []
    for entry in PLAN:
        if only and not any(
            entry["name"] == o or (o.endswith("*") and entry["name"].startswith(o[:-1]))
            for o in only
        ):
            continue
        done = run(entry, manifest)
        manifest = [e for e in manifest if e["name"] != done["name"]] + [done]
        save(manifest)
        woken = ", ".join(f"{s} {shown(r)}" for s, r in done["quantized"].items())
        print(
            f"{done['name']}: {done['seconds']:.0f} s, float {shown(done['float'])}, "
            f"quantized {woken}, strong {done.get('strong', '-')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
