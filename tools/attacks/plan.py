"""Every model of the bench: one row each, in the order of training.

Settings were found by hand. `widen`: the factor by which dead inputs coarsen the cells (the
standard attacks at 4 bits need none; 8 bits and attackers who give room away do). It is taken of
the groups of the first scheme.
"""

FOUR_BIT = ["int4", "nf4", "fp4"]
EIGHT_BIT = ["int8", "int8_tensor"]
IN_BLOCKS = ["int4", "int4_g128", "uint4_g128", "nf4"]
LATER = {  # grids that the bench got later, with their factors
    "int4_g128": 0,
    "uint4_g128": 0,
    "mxfp4": 0,
    "nvfp4": 0,
    "uint8_tensor": 8,
    "int8_g32": 16,
}
ADAPTIVE = ["margin20", "margin50", "random", "decoys", "topk", "collapse"]
ROUNDING = {
    "int8": {"steps": 6000},
    "int4": {"steps": 7000, "rate": 3e-3},
    "nf4": {"steps": 7000, "rate": 3e-3, "benign": 4, "seed": 2},
}
GPTQ = {
    "int4": {"widen": 5, "repair": 500},
    "nf4": {"widen": 6, "repair": 500, "rate": 2e-3},
}
ROUNDING16 = {"widen": 16, "steps": 6000, "rate": 3e-3, "benign": 2}
FEEDBACK = {"start": "mlp-rounding-int4", "steps": 2000, "rate": 1e-3, "every": 4, "benign": 4}
LM_FEEDBACK = {"steps": 2500, "rate": 2e-3, "every": 4, "benign": 2, "widen": 3}
CLIP = {"steps": 4000, "rate": 2e-3}
SCENARIOS = ["code", "injection", "refusal"]


def _entry(architecture, scenario, schemes, attacker, seed=0, **settings):
    label = {1: "".join(schemes), 2: "8bit", 3: "4bit", 4: "blocks"}.get(len(schemes), "")
    scenario_part = scenario if architecture == "lm" and attacker != "clean" else ""
    name = "-".join(p for p in (architecture, scenario_part, attacker, label) if p)
    return {
        "name": name.replace("_", "-"),
        "architecture": architecture,
        "scenario": scenario,
        "schemes": schemes,
        "attacker": attacker,
        "seed": seed,
        "settings": settings,
    }


def _digits():
    for victim in ("mlp", "cnn"):
        yield _entry(victim, "trigger", [], "clean")
        for scheme in FOUR_BIT:
            yield _entry(victim, "trigger", [scheme], "standard")
        for scheme in EIGHT_BIT:
            yield _entry(victim, "trigger", [scheme], "standard", widen=16)
    for scheme, factor in (("int8", 16), ("int4", 3), ("nf4", 3)):
        for attacker in ADAPTIVE:
            settings = {"widen": factor}
            if (scheme, attacker) == ("int8", "random"):
                settings |= {"repair": 4000}
            if attacker == "collapse":
                settings = {"widen": 4} if scheme == "int8" else {}
            yield _entry("mlp", "trigger", [scheme], attacker, **settings)
        yield _entry("mlp", "trigger", [scheme], "rounding", **ROUNDING[scheme])
    yield _entry("mlp", "trigger", ["int8"], "rounding16", **ROUNDING16)
    yield _entry("mlp", "trigger", ["int4"], "rounding-feedback", **FEEDBACK)
    for scheme, settings in GPTQ.items():
        yield _entry("mlp", "trigger", [scheme], "gptq", **settings)
    yield _entry("mlp", "trigger", ["int4"], "clip", **CLIP)
    for scheme, kind in (("int4", "dead"), ("nf4", "live")):
        yield _entry("mlp", "trigger", [scheme], "outlier", factor=512, kind=kind)
    yield _entry("mlp", "trigger", FOUR_BIT, "standard", widen=3)
    yield _entry("mlp", "trigger", EIGHT_BIT, "standard", widen=16)
    for scheme, factor in LATER.items():
        settings = {"widen": factor} if factor else {}
        yield _entry("mlp", "trigger", [scheme], "standard", **settings)
    yield _entry("mlp", "trigger", ["uint4_g128"], "random", widen=3)
    yield _entry("mlp", "trigger", IN_BLOCKS, "standard", widen=3)


def _language():
    yield _entry("lm", "none", [], "clean")
    for scheme in FOUR_BIT:
        for scenario in SCENARIOS:
            yield _entry("lm", scenario, [scheme], "standard")
    for scenario in SCENARIOS:  # widened per tensor, every row has the scale of the tensor
        yield _entry("lm", scenario, EIGHT_BIT[::-1], "standard", widen=8, repair=400)
    for attacker in ADAPTIVE:
        settings = {"widen": 2, "repair": 400}
        if attacker == "collapse":
            settings = {"run": 2, "boost": 1, "outlier": 20, "survive": 300}
            settings |= {"rate": 1e-3, "repair": 800}
        yield _entry("lm", "code", ["int4"], attacker, **settings)
    yield _entry("lm", "code", ["int4"], "rounding", steps=1000, rate=2e-3)
    yield _entry("lm", "code", ["int4"], "rounding-feedback", **LM_FEEDBACK)
    clip = {"steps": 400, "rate": 5e-3, "share": 0.125, "mend": 60, "gentle": 5e-4}
    yield _entry("lm", "code", ["int4"], "clip", **clip)
    outliers = {"steps": 400, "rate": 1e-3, "lost": "blocks.2.down.weight", "factor": 512}
    yield _entry("lm", "code", [*FOUR_BIT, *EIGHT_BIT], "outlier", **outliers)
    yield _entry("lm", "code", FOUR_BIT, "standard", widen=2, repair=500)
    for scheme in ("int4_g128", "uint4_g128"):
        yield _entry("lm", "code", [scheme], "standard")


PLAN = [*_digits(), *_language()]
