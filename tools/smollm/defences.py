"""What is done to the attacked file before it is judged: rows, one per file."""

import tempfile
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx

from flipguard_onnx import der, scan
from tools.bench.defences import DEFENCES, OURS, Case, Defence, guarded
from tools.language_models import feed, load
from tools.smollm import files, judge, victim

FLOAT, ONNXRUNTIME, WITH_DATA = "float", "onnxruntime", "ours-data"
RATIOS = (6, 8, 10, 15, 20)  # the paper's best, by model and scheme
JUDGED = (FLOAT, ONNXRUNTIME)
DEFENDED = (
    "none",
    *(f"topk-{percent}" for percent in RATIOS),
    "noise-box",
    "unbiased",
    OURS,
    WITH_DATA,
    "ours-share",
)


class Bench:
    """An attacked file, and how what becomes of it is measured.

    asked: `lessons`, `choices`, `windows`, `tokens` and `batch`, as judge.rates takes them. clean:
    rates of the clean model, the DER's baseline; its utilities are the shares of tokens and of
    questions that are guessed right. checked: how many prompts are run in onnxruntime as well.
    """

    def __init__(self, model, export, scenario, asked, clean, shown, checked):
        self._folder, self._export, self._scenario = model, export, scenario
        self._asked, self._clean, self._shown, self._checked = asked, clean, shown, checked
        self._model, self._tokenizer = victim.load(model / "hf")

    @cached_property
    def _places(self):
        return files.places(onnx.load(self._export, load_external_data=False), self._model)

    def row(self, scheme, name, seed):
        """One row: what was done, what it cost, what is left of the attack and of the utility."""
        with tempfile.TemporaryDirectory(dir=self._export.parent) as folder:
            target = Path(folder) / "model.onnx"
            started = time.perf_counter()
            modified = self._make(scheme, name, seed, target)
            seconds = time.perf_counter() - started
            target = self._export if name == FLOAT else target
            victim.assign(self._model, files.read(target, self._places, self._model))
            found, said = judge.rates(self._model, self._tokenizer, self._scenario, **self._asked)
            some = np.linspace(0, len(said) - 1, min(self._checked, len(said))).astype(int)
            agreement = judge.agreement(
                target,
                self._tokenizer,
                [self._asked["lessons"][i] for i in some],
                [said[i] for i in some],
            )
        return {
            "scenario": self._scenario, "export": self._export.parent.name, "scheme": scheme,
            "defence": name, "seed": seed, **found, "modified": modified, "seconds": seconds,
            "der": self._der(found, modified), "agreement": agreement,
            "answers": self._tokenizer.batch_decode(said[:5]),
        }  # fmt: skip

    def _make(self, scheme, name, seed, target):
        """Writes the file; the share of codes that differ from plain rounding's."""
        if name == FLOAT:
            return 0.0
        if name == ONNXRUNTIME:
            files.quantize(self._export, scheme, target)
            return 0.0
        case = Case(self._export, scheme, target.parent)
        defence = DEFENCES.get(name) or Defence(
            partial(guarded, preserve="data", data=self._data())
        )
        return defence.make(case, target, seed) / case.size

    def _data(self):
        path = self._export.with_name("data.npz")
        if not path.exists():
            np.savez(path, **feed(load(self._export), self._shown))
        return path

    def _der(self, found, modified):
        utility, baseline = ([rates["next"], rates["choice"]] for rates in (found, self._clean))
        return der(1 - found["attack"], utility, 1 - self._clean["attack"], baseline, modified)


def draws(name):
    """Whether the result depends on the seed."""
    return name == WITH_DATA or (name in DEFENCES and DEFENCES[name].draws)


def verdict(export):
    """What `scan` says of the float file."""
    return asdict(scan(export).verdict)
