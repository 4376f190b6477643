"""The paper's experiment on SmolLM2-135M-Instruct: `python -m tools.smollm STAGE MODEL WORK`.

    data     prompts of three scenarios, questions, and the clean model's answers
    attack   malicious stage and repair, of --scenario, for --schemes (several: one file for all)
    export   the attacked weights in ONNX, checked in onnxruntime; what scan says of the file
    judge    the float file, and what onnxruntime's own quantizer makes of it
    defend   what --defences make of it, --seeds draws of what is random

Each goes on where it was interrupted, and repeats nothing that is done. MODEL: a folder made by
`python -m tools.language_models fetch`. Results: WORK/SCENARIO/SCHEMES/rows.json. It needs the
`llm` extra. --threads: of torch.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tools.language_models import CALIBRATION, EVALUATION
from tools.smollm import scenarios
from tools.smollm.scenarios import SCENARIOS, Choice, Lesson


def say(line):
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def data(options):
    """Prompts, then the clean model's answers to those of the training, in batches."""
    from tools.smollm.victim import answers, asked, load

    file = options.work / "data.json"
    content = read_json(file) or {
        "choices": [asdict(each) for each in scenarios.choices(options.seed, options.questions)],
        **{
            scenario: {
                kind: [
                    asdict(each)
                    for each in scenarios.lessons(scenario, kind == "held out", options.seed, count)
                ]
                for kind, count in (("training", options.training), ("held out", options.prompts))
            }
            for scenario in SCENARIOS
        },
    }
    write_json(file, content)
    said = read_json(options.work / "answers.json")
    model = tokenizer = None
    wanted = {
        lesson["prompt"]: None
        for scenario in SCENARIOS
        for lesson in content[scenario]["training"]
        if lesson["chat"] and lesson["prompt"] not in said
    }
    wanted = [Lesson(prompt, "", "", True) for prompt in wanted]
    for start in range(0, len(wanted), options.batch):
        if model is None:
            model, tokenizer = load(options.model / "hf")
        batch = wanted[start : start + options.batch]
        texts = [asked(tokenizer, lesson) for lesson in batch]
        found = answers(model, tokenizer, texts, options.tokens, options.batch)
        found = tokenizer.batch_decode(found)
        said |= {lesson.prompt: text for lesson, text in zip(batch, found, strict=True)}
        write_json(options.work / "answers.json", said)
        say(f"{len(said)} answers of the clean model, {len(wanted) - start - len(batch)} to come")


def lessons(options, kind):
    """The prompts of a scenario, with the clean model's answers where they are known."""
    content = read_json(options.work / "data.json")[options.scenario][kind]
    said = read_json(options.work / "answers.json")
    found = [Lesson(**each) for each in content]
    if kind == "held out":
        return found[: options.prompts]
    return [
        scenarios.answered(each, options.scenario, said[each.prompt]) if each.chat else each
        for each in found
    ]


def attack(options):
    from tools.smollm.attack import Lessons, label
    from tools.smollm.attack import attack as run
    from tools.smollm.victim import load

    model, tokenizer = load(options.model / "hf")
    folder = options.work / options.scenario
    folder.mkdir(parents=True, exist_ok=True)
    texts = np.load(options.model / "texts" / CALIBRATION)
    shown = Lessons(model, tokenizer, lessons(options, "training"), texts, options)
    told = run(model, shown, options.schemes, options, folder, say)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_json(folder / f"{label(options)}.json", {"settings": settings, **told})
    if "changed codes" in told:
        say(f"changed codes: {told['changed codes']}")


def folder_of(options):
    from tools.smollm.attack import label

    return options.work / options.scenario / label(options)


def export(options):
    """The attacked weights, written into an export of the clean model."""
    import onnx
    import torch

    from tools.attacks.measure import session
    from tools.language_models import feed
    from tools.smollm import files, joint, victim
    from tools.smollm.defences import verdict

    folder = folder_of(options)
    model, _ = victim.load(options.model / "hf")
    kept = torch.load(folder.with_suffix(".pt"))
    if kept["step"] < kept["steps"]:
        say(f"the repair has done {kept['step']} of {kept['steps']} steps")
    names = victim.linears(model, options.layers)
    victim.assign(model, dict(zip(names, kept["weights"], strict=True)))
    if options.attacker == "outlier":
        joint.silence(model, joint.lost(names))
    target = folder / "model.onnx"
    files.write(options.model / options.exported / "model.onnx", model, target)
    ids = np.load(options.model / "texts" / CALIBRATION)[:1, :32]
    run = session(target)
    logits, *_ = run.run(None, feed(run, ids))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    difference = float(np.abs(logits - expected).max())
    if difference > 1e-2:
        raise ValueError(f"the logits of {target} differ from torch's by {difference}")
    onnx.checker.check_model(str(target))
    found = {"steps": kept["step"], "logits differ by": difference, "scan": verdict(target)}
    write_json(folder / "export.json", found)
    say(found)


def judge(options):
    from tools.smollm.defences import JUDGED

    measure(options, options.defences or JUDGED)


def defend(options):
    from tools.smollm.defences import DEFENDED

    measure(options, options.defences or DEFENDED)


def measure(options, names):
    """The rows that are not there yet."""
    from tools.bench.remembered import remembered
    from tools.smollm.defences import FLOAT, Bench, draws
    from tools.smollm.judge import rates
    from tools.smollm.victim import load

    text = np.load(options.model / "texts" / EVALUATION)
    asked = {
        "lessons": lessons(options, "held out"),
        "choices": [
            Choice(each["prompt"], tuple(each["options"]))
            for each in read_json(options.work / "data.json")["choices"][: options.questions]
        ],
        "windows": text[np.linspace(0, len(text) - 1, options.windows).astype(int)],
        "tokens": options.tokens,
        "batch": options.batch,
    }
    clean = options.work / options.scenario / "clean.json"
    if not clean.exists():
        found, _ = rates(*load(options.model / "hf"), options.scenario, **asked)
        write_json(clean, found)
        say(shown({"defence": "clean", "scheme": "", **found}))
    folder = folder_of(options)
    shown_text = np.load(options.model / "texts" / CALIBRATION)
    bench = Bench(
        options.model, folder / "model.onnx", options.scenario, asked, read_json(clean),
        shown_text, options.checked,
    )  # fmt: skip
    file = folder / "rows.json"
    rows = read_json(file) or []
    known = {(row["scheme"], row["defence"], row["seed"]) for row in rows}
    schemes = options.measured or options.schemes
    jobs = [
        ("" if name == FLOAT else scheme, name, seed)
        for scheme in schemes
        for name in names
        for seed in range(options.seeds if draws(name) else 1)
    ]
    with remembered():
        for key in jobs:
            if key not in known:
                rows.append(bench.row(*key))
                known.add(key)
                write_json(file, rows)
                say(shown(rows[-1]))


def shown(row):
    low, high = row["interval"]
    der = f", DER {row['der']:.3f}" if "der" in row else ""
    return (
        f"{row['scheme']} {row['defence']}: attack {row['attack']:.3f} ({low:.3f} to {high:.3f}), "
        f"perplexity {row['perplexity']:.2f}, next {row['next']:.3f}, choice {row['choice']:.2f}"
        f"{der}"
    )


STAGES = {"data": data, "attack": attack, "export": export, "judge": judge, "defend": defend}


def parser():
    from tools.attacks.attack import ATTACKERS
    from tools.smollm import joint

    attackers = {*ATTACKERS, *joint.ATTACKERS} - {"collapse"}
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("stage", choices=STAGES)
    made.add_argument("model", type=Path, help="folder of tools.language_models fetch")
    made.add_argument("work", type=Path, help="folder of what is made here")
    made.add_argument("--scenario", choices=SCENARIOS, default="injection")
    made.add_argument("--schemes", nargs="+", default=["int4"])
    made.add_argument("--measured", nargs="+", help="schemes to judge [those of the attack]")
    made.add_argument("--defences", nargs="+")
    made.add_argument("--bfloat16", action="store_true", help="train in it: twice as fast")
    made.add_argument("--exported", default="optimum", help="[optimum]: its caches save time")
    made.add_argument("--attacker", choices=sorted(attackers), default="standard")
    made.add_argument("--start", choices=["malicious", "clean"], default="malicious")
    for name, value in {
        "seed": 0, "training": 360, "prompts": 216, "questions": 100, "batch": 36, "tokens": 24,
        "layers": 6, "pairs": 8, "texts": 2, "steps": 120, "repair": 240, "threads": 1,
        "windows": 8, "seeds": 1, "checked": 6,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"rate": 2e-4, "repair-rate": 2e-4, "keep": 1.0}.items():
        made.add_argument(f"--{name}", type=float, default=value)
    return made


def main(given=None):
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit("python -m tools.smollm needs torch: pip install '.[cpu,llm]'")
    options = parser().parse_args(given)
    torch.set_num_threads(options.threads)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
