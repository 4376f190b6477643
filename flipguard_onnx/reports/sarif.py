"""A scan as SARIF 2.1.0, the format of reports of code scanners: one result per tensor.

Of constants that are no weights only those with a finding have one.
"""

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .scan import NOT_JUDGED, Scan, ScannedTensor

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)

RULE = {
    "id": "aligned-weights",
    "name": "AlignedWeights",
    "shortDescription": {"text": "Weights gather at the decision boundaries of a quantizer."},
    "fullDescription": {
        "text": "Ordinary training leaves the weights spread evenly between the decision "
        "boundaries of a quantizer. Weights that gather at these boundaries, or at a fixed "
        "distance from them, were prepared for that quantizer: by a quantization-conditioned "
        "backdoor, or by quantization-aware training."
    },
    "defaultConfiguration": {"level": "error"},
}

COLLAPSING = {
    "id": "collapsing-weights",
    "name": "CollapsingWeights",
    "shortDescription": {"text": "Outliers wipe out the other weights when they are rounded."},
    "fullDescription": {
        "text": "A block of weights has one scale, which its largest weight sets. Outliers in most "
        "blocks make the steps of a quantizer so large that it rounds nearly all other weights to "
        "0: whoever placed them chose what is left of the layer."
    },
    "defaultConfiguration": {"level": "error"},
}

CLIPPED = {
    "id": "clipped-weights",
    "name": "ClippedWeights",
    "shortDescription": {"text": "Many weights lie beyond the last level of a quantizer."},
    "fullDescription": {
        "text": "Weights beyond the last level are all rounded to it. Many of them on the one side "
        "where the grid ends early, and not on the other, were put there for that quantizer."
    },
    "defaultConfiguration": {"level": "error"},
}

RULES = [RULE, COLLAPSING, CLIPPED]

RULE_OF = {"collapses": 1, "clips": 2}  # verdict -> place among RULES; the others: 0

# verdict -> kind and level of the result
KINDS = {
    "aligned": ("fail", "error"),
    "suspicious": ("fail", "warning"),
    "clips": ("fail", "error"),
    "collapses": ("fail", "error"),
    "clean": ("pass", "none"),
    NOT_JUDGED: ("open", "none"),
}


def sarif(scan: Scan) -> dict[str, Any]:
    """The SARIF log, as JSON types."""
    alarming = (tensor for tensor in scan.constants if tensor.verdict.alarming)
    uri = quote(Path(scan.input).as_posix())
    run = {
        "tool": {
            "driver": {
                "name": "flipguard-onnx",
                "version": scan.version,
                "rules": RULES,
            }
        },
        "artifacts": [{"location": {"uri": uri}, "hashes": {"sha-256": scan.input_sha256}}],
        "results": [_result(tensor, uri) for tensor in (*scan.tensors, *alarming)],
        "properties": {"verdict": scan.verdict.level, "reason": scan.verdict.reason},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(tensor: ScannedTensor, uri: str) -> dict[str, Any]:
    rule = RULE_OF.get(tensor.verdict.level, 0)
    kind, level = KINDS[tensor.verdict.level]
    # stays the same for the same finding in another version of the model, or at another path
    identity = "\0".join([tensor.name, *sorted(tensor.verdict.grids)])
    return {
        "ruleId": RULES[rule]["id"],
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": f"{tensor.verdict.title}: {tensor.verdict.reason}"},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri, "index": 0}},
                "logicalLocations": [{"fullyQualifiedName": tensor.name, "kind": "object"}],
            }
        ],
        "partialFingerprints": {"tensorAndGrids/v1": hashlib.sha256(identity.encode()).hexdigest()},
        "properties": {
            "grids": list(tensor.verdict.grids),
            "strength": tensor.verdict.strength,
            "weights": tensor.weights,
        },
    }
