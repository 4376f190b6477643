"""Run guard() in forked processes, kill them all, and print what they leave, as JSON.

python tests/helpers/killed.py SOURCE TARGET MODE [COUNT]

    random 100   kill -9 at 100 random moments
    kill         kill -9 before each file operation
    terminate    SIGTERM there, and at the next two again
    race 20      four runs at once, 20 times

Starting Python takes a second and a fork a tenth of it. Every other time the target is absent, else
it is the output of seed 1; that of seed 2 is to be written.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1"}  # bears a fork

import flipguard_onnx
from flipguard_onnx.interrupts import Interrupted, interruptible

SEEDS = (1, 2)
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")


def guard(source, target, seed):
    return flipguard_onnx.guard(
        source, output=target, seed=seed, force=True, validate=False, preserve="off"
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def state(target, known):
    """Absent, the seed whose output is there with all its data, or broken."""
    if not target.exists():
        return "absent"
    found = contents(target.parent)
    whole = [seed for seed, files in known.items() if files.items() <= found.items()]
    return str(whole[0]) if whole else "broken"


def left_over(folder):
    """Workspaces and locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def stop_before(step, folder, number):
    """Let the signal come before operation number `step` on a file below `folder`."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS or (event == "open" and str(arguments[0]).startswith(str(folder))):
            seen += 1
            if step < seen <= step + 3:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def start(source, target, seed, step=None, number=signal.SIGKILL):
    """A process that guards; the signal comes before a step, if one is given."""
    child = os.fork()
    if child == 0:
        try:
            with interruptible():
                if step is not None:
                    stop_before(step, target.parent, number)
                guard(source, target, seed)
        except Interrupted as signal_:
            os._exit(signal_.code)
        os._exit(0)
    return child


def wait(child):
    """Exit code, or -signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(target, files):
    for path in target.parent.glob(f"{target.name}*"):
        path.unlink()
    for name, content in files.items():
        (target.parent / name).write_bytes(content)


def main(source, target, mode, count="0"):
    source, target = Path(source), Path(target)
    known, seconds = {}, 0.0
    for seed in SEEDS:
        reference = target.parent / f"reference-{seed}"
        reference.mkdir()
        started = time.perf_counter()
        guard(source, reference / target.name, seed)
        seconds = time.perf_counter() - started
        known[seed] = contents(reference)
    states, codes, extra, step = Counter(), Counter(), set(), 0
    for trial in itertools.count():
        prepare(target, known[1] if trial % 2 else {})
        before = state(target, known)
        if mode == "random":
            children = [start(source, target, 2)]
            time.sleep(random.uniform(0, 1.4 * seconds))
            os.kill(children[0], signal.SIGKILL)
        elif mode == "race":
            children = [start(source, target, seed) for seed in SEEDS * 2]
        else:
            number = signal.SIGKILL if mode == "kill" else signal.SIGTERM
            children = [start(source, target, 2, step, number)]
            step += trial % 2
        found = [wait(child) for child in children]
        codes.update(found)
        states[f"{before}, then {state(target, known)}"] += 1
        if mode in ("race", "terminate"):
            extra.update(left_over(target.parent))
            data = {name for files in known.values() for name in files}
            extra.update({path.name for path in target.parent.glob(f"{target.name}*")} - data)
        if mode == "random" and codes[-signal.SIGKILL] == int(count):
            break
        if mode == "race" and trial == int(count) - 1:
            break
        if mode in ("kill", "terminate") and trial % 2 and found == [0]:
            break
    guard(source, target, 2)
    extra.update(left_over(target.parent))
    extra.update({path.name for path in target.parent.glob(f"{target.name}*")} - set(known[2]))
    print(json.dumps({"codes": codes, "states": states, "extra": sorted(extra)}))


main(*sys.argv[1:])
