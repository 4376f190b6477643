"""Throw broken models at the command line for as long as you like.

    python -m tools.fuzz --seconds 60 --seed 1 --jobs 2

Models of the tests and of the repository are mutated, as bytes and as protobuf messages (shapes,
types, names, attributes, external data), and handed to inspect, scan and guard in worker processes
with limits on time and memory. Allowed: exit codes 0, 1 and 2; one line "flipguard-onnx: ..." that
a terminal can show where it is not 0; no traceback, hang or dead process; no file but the outputs
of a run that succeeds; the input as it was. Everything else is a finding, kept with the command
that shows it again (case I of seed S: --seed S --first I --cases 1).
"""

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto

from tests.helpers.samples import SAMPLES

ROOT = Path(__file__).parents[2]
LARGEST = 4_000_000  # bytes of a model of the corpus
CASE_SECONDS = 600  # for one case; the machine may be busy
WARM_UP_SECONDS = 3600  # for the first ones, which may have to compile kernels
RUN_SECONDS = 3.0  # for one run of a model in onnxruntime
MEMORY = 6 << 30  # bytes of a worker
SCHEMES = ("int8", "int4", "nf4", "fp4")
INTEGERS = (0, 1, -1, 2, 3, 7, 8, 16, 64, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, 1e-38, 1e-45, float("nan"), float("inf"), float("-inf"))
MARKUP = "<script>alert(1)</script>"
STRINGS = (
    "",
    MARKUP,
    "../outside",
    "/etc/passwd",
    "x" * 3000,
    "\x1b[2J\n",
    "a\0b",
    "‮",
    "0",
    "-1",
    "é",
)


@cache
def corpus():
    """By kind: names and contents of the models that are mutated."""
    kinds = {"samples": [(n, make().SerializeToString()) for n, make in SAMPLES.items()]}
    for folder in ("models", "models/attacks", "models/architectures", "models/downloaded"):
        paths = sorted((ROOT / folder).glob("*.onnx"))
        found = [(p.name, p.read_bytes()) for p in paths if p.stat().st_size < LARGEST]
        if found:
            kinds[folder] = found
    return kinds


# --- mutations


def mutate_bytes(content, rng):
    """Overwrite, flip, move, cut and repeat bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        size = len(content) or 1
        place = rng.randrange(min(size, rng.choice((300, 3000, size))))
        match rng.randrange(6):
            case 0:
                content[place : place + 1] = bytes([rng.choice((0, 1, 127, 128, 255))])
            case 1:
                content[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                other = rng.randrange(size)
                content[place : place + 8] = content[other : other + 8]
            case 3:
                del content[place : place + rng.choice((1, 2, 10, 1000))]
            case 4:
                content[place:place] = content[place : place + rng.choice((1, 10, 100))]
            case 5:
                if rng.random() < 0.2:
                    del content[place:]
    return bytes(content)


def mutate_messages(content, rng):
    """Change fields of messages anywhere in the model, by what they may hold."""
    proto = ModelProto()
    proto.ParseFromString(content)
    messages = list(all_messages(proto))
    names = [value for message in messages for value in strings_of(message)] or [""]
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        message = rng.choice(messages)
        fields = [field for field, _ in message.ListFields()]
        if rng.random() < 0.2 or not fields:
            fields = message.DESCRIPTOR.fields
        with contextlib.suppress(ValueError, TypeError):  # values that protobuf itself refuses
            mutate_field(message, rng.choice(fields), names, rng)
    return proto.SerializeToString()


def all_messages(message):
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                yield from all_messages(inner)


def strings_of(message):
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str) else value


def mutate_field(message, field, names, rng):
    value = getattr(message, field.name)
    if isinstance(value, Message):
        if rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            value.SetInParent()
    elif not isinstance(value, (int, float, str, bytes)):
        mutate_repeated(value, field, names, rng)
    else:
        setattr(message, field.name, scalar(field, value, names, rng))


def mutate_repeated(values, field, names, rng):
    place = rng.randrange(len(values)) if len(values) else None
    is_message = field.type == field.TYPE_MESSAGE
    choice = rng.randrange(4)
    if choice == 0 and place is not None:
        del values[place]
    elif choice == 1 and is_message:
        values.add().CopyFrom(values[place]) if place is not None else values.add()
    elif choice == 2 and place is not None and is_message:
        values[place].CopyFrom(rng.choice(values))
    elif choice == 3 and len(values) > 1:
        del values[rng.randrange(len(values)) :]
    elif not is_message and place is not None:
        values[place] = scalar(field, values[place], names, rng)
    elif not is_message:
        values.append(scalar(field, 0, names, rng))


def scalar(field, value, names, rng):
    """Another value of the field's type."""
    if field.type == field.TYPE_STRING:
        return rng.choice((*STRINGS, *rng.choices(names, k=20)))
    if field.type == field.TYPE_BYTES:
        return mutate_numbers(value, rng)
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.type == field.TYPE_ENUM:
        return rng.choice(list(field.enum_type.values_by_number))
    return rng.choice((*INTEGERS, value + 1, value - 1, rng.randrange(30)))


def mutate_numbers(raw, rng):
    """Bytes of a tensor: longer, shorter, or with special values in them."""
    raw = bytes(raw) if isinstance(raw, bytes) else b""
    match rng.randrange(4):
        case 0:
            return raw[: rng.randrange(len(raw) + 1)]
        case 1:
            return raw + bytes(rng.choice((1, 4, 100)))
        case 2:
            special = rng.choice(
                (b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0")
            )
            place = rng.randrange(len(raw) // 4 + 1) * 4
            return raw[:place] + special + raw[place + 4 :]
        case _:
            return bytes(len(raw))


def make_external(content, folder):
    """The model with its data in a file beside it; mutations then meet the references."""
    proto = ModelProto()
    proto.ParseFromString(content)
    onnx.save(
        proto,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return (folder / "model.onnx").read_bytes()


def make_case(seed, index, folder):
    """Write case `index` of a seed into an empty folder; the arguments for it."""
    rng = random.Random(f"{seed}:{index}")
    kinds = corpus()
    kind = "samples" if rng.random() < 0.7 else rng.choice(sorted(kinds))
    _, content = rng.choice(kinds[kind])
    if kind == "samples" and rng.random() < 0.2:
        content = make_external(content, folder)
    mutate = mutate_messages if rng.random() < 0.7 else mutate_bytes
    content = mutate(content, rng)
    path = folder / "model.onnx"
    path.write_bytes(content)
    data = folder / "model.onnx.data"
    if data.exists() and rng.random() < 0.3:
        data.write_bytes(mutate_bytes(data.read_bytes(), rng))
    scheme = ("--scheme", rng.choice(SCHEMES))
    command = rng.choices(("guard", "inspect", "scan"), (0.6, 0.25, 0.15))[0]
    if command == "inspect":
        return ["inspect", str(path), *scheme]
    if command == "scan":
        return ["scan", str(path), "--format", rng.choice(("text", "json", "sarif", "html"))]
    options = ["--seed", "1", *scheme]
    for option, share in (
        (("--no-validate",), 0.4),
        (("--preserve", "off"), 0.4),
        (("--target", "onnxruntime"), 0.3),
        (("--emit", "both"), 0.2),
        (("--policy", "none"), 0.1),
        (("--include", "*w*"), 0.1),
    ):
        if rng.random() < share:
            options += option
    return ["guard", str(path), *options]


# --- one case


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def problem(command, result, before, after):
    """What is wrong with a run, or None. A scan says what it found by its exit code, too."""
    if result["exception"]:
        return f"raises {result['exception']}"
    code, lines = result["code"], result["stderr"].splitlines()
    if code not in (0, 1, 2):
        return f"exit code {code}"
    lines = [line for line in lines if not line.endswith(" ...")]
    if code == 0 and lines:
        return f"exit code 0 with {lines[0]!r} on stderr"
    judged = command == "scan" and not lines and result["stdout"].strip()
    if code and not judged and not (len(lines) == 1 and lines[0].startswith("flipguard-onnx: ")):
        return f"{len(lines)} lines on stderr: {lines[:1]!r}"
    if not all(line.isprintable() for line in (*lines, *result["stdout"].split("\n"))):
        return "prints what is not printable"
    if MARKUP in result["stdout"] and "<html" in result["stdout"]:
        return "prints markup that a name brought"
    if any(after.get(path) != content for path, content in before.items()):
        return "the input has changed"
    new = {path.name for path in after.keys() - before.keys()}
    if code and new:
        return f"leaves {sorted(new)}"
    if any(not name.startswith("model.flipguard-") for name in new):
        return f"writes {sorted(new)}"
    return None


def serve():
    """A worker: arguments as a JSON line in, the outcome as a JSON line out."""
    os.dup2(2, 1)  # nothing but answers may reach the pipe
    sys.path.insert(0, str(ROOT))
    from click.testing import CliRunner

    from flipguard_onnx import runtime
    from flipguard_onnx.calibration import inputs
    from flipguard_onnx.cli.commands import main

    runtime.shared_child.limits = runtime.Limits(seconds=RUN_SECONDS)
    inputs.TRY_SECONDS = RUN_SECONDS
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answers = os.fdopen(int(sys.argv[-1]), "w")
    for line in sys.stdin:
        result = CliRunner().invoke(main, json.loads(line))
        exception = "" if isinstance(result.exception, SystemExit) else repr(result.exception)
        answer = {
            "code": result.exit_code,
            "exception": exception if result.exception else "",
            "stdout": result.stdout,
            "stderr": result.stderr,
        }
        if answer["exception"]:
            import traceback

            answer["where"] = "".join(traceback.format_exception(*result.exc_info)[-3:])
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A worker process, its kernels compiled, and the way to ask it."""

    def __init__(self):
        receive, send = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fuzz", "--serve", str(send)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(send,),
            cwd=ROOT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        )
        os.close(send)
        self._answers = os.fdopen(receive)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(corpus()["samples"][0][1])
            for scheme in SCHEMES:
                answer = self.ask(["guard", str(path), "--scheme", scheme], WARM_UP_SECONDS)
                if isinstance(answer, str) or answer["code"]:
                    raise RuntimeError(f"a sound model: {answer}")

    def ask(self, arguments, seconds=CASE_SECONDS):
        """The outcome, or a text: what became of the process."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._answers], [], [], seconds)
        line = self._answers.readline() if ready else None
        if line:
            return json.loads(line)
        self._process.kill()
        return f"hangs for {seconds} s" if line is None else f"dies: {self._process.wait()}"

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def run(seconds, seed, job=0, jobs=1, first=0, cases=None, keep=None):
    """Cases `first + job`, `first + job + jobs`, ...; counts of the outcomes, and the findings."""
    counts, findings = Counter(), []
    process, index, ended = Process(), first + job, time.monotonic() + seconds
    while time.monotonic() < ended and (cases is None or index < first + cases):
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / "in"
            folder.mkdir()
            try:
                arguments = make_case(seed, index, folder)
            except (DecodeError, onnx.checker.ValidationError):
                index += jobs
                continue
            before = snapshot(Path(home))
            answer = process.ask(arguments)
            if isinstance(answer, str):
                wrong, where, process = answer, "", Process()
            else:
                wrong = problem(arguments[0], answer, before, snapshot(Path(home)))
                where = answer.get("where", "")
                counts[f"{arguments[0]} {answer['code']}"] += 1
            if wrong:
                counts["findings"] += 1
                findings.append(
                    f"case {index} of seed {seed}: {' '.join(arguments)}: {wrong}\n{where}"
                )
                if keep:
                    target = Path(keep) / f"{seed}-{index}"
                    shutil.copytree(folder, target, dirs_exist_ok=True)
                    (target / "finding.txt").write_text(findings[-1])
        index += jobs
    process.close()
    return counts, findings


def main():
    parser = argparse.ArgumentParser(description="Mutated models against the command line.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="the largest number of cases")
    parser.add_argument("--keep", type=Path, help="folder for the findings")
    options = parser.parse_args()
    shared = {"first": options.first, "cases": options.cases, "keep": options.keep}
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run, options.seconds, options.seed, job, options.jobs, **shared)
            for job in range(options.jobs)
        ]
        results = [job.result() for job in jobs]
    counts = sum((counts for counts, _ in results), Counter())
    findings = [finding for _, found in results for finding in found]
    cases = sum(n for outcome, n in counts.items() if outcome != "findings")
    print(f"{cases} cases of seed {options.seed}, {len(findings)} findings")
    for outcome, count in sorted(counts.items()):
        print(f"  {outcome:10} {count}")
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        sys.exit(main())
