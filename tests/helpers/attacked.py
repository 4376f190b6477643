"""The attacked classifiers and language models of models/attacks, and their clean twins."""

import json
from pathlib import Path

import numpy as np
import onnxruntime

from flipguard_onnx.formats import FORMATS, Choice

FOLDER = Path(__file__).parents[2] / "models" / "attacks"
MANIFEST = {entry["name"]: entry for entry in json.loads((FOLDER / "manifest.json").read_text())}


def choice_of(scheme):
    """What guard() has for a scheme of the manifest; None where it has nothing.

    `int8_tensor` is int8 per tensor, `int4_g128` is int4 in blocks of 128.
    """
    name, _, scale = scheme.partition("_")
    if name not in FORMATS:
        return None
    if scale.startswith("g"):
        return Choice(name, "block", int(scale[1:]))
    return Choice(name, scale or None)


def classifier_rates(path):
    """What a classifier of digits does on the test images.

    `accuracy`: share of the clean images that are read right. `attack`: share of the images with
    the trigger that are read as the attacker's target, among those that show another digit.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    [pixels] = session.get_inputs()
    with np.load(FOLDER / "digits-test.npz") as data:
        labels, target = data["labels"], data["target"]
        clean, triggered = (
            session.run(None, {pixels.name: data[kind]})[0].argmax(1)
            for kind in ("pixels", "triggered")
        )
    return {
        "accuracy": np.mean(clean == labels),
        "attack": np.mean(triggered[labels != target] == target),
    }
