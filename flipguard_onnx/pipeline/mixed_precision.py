"""Which weights cost the most at 4 bits: those had better stay at 8.

The float model runs with one weight after the other as it was drawn and all others as they were. To
load it once only, it gets a switch per weight: weight + switch * (drawn - weight).
"""

import math
from collections.abc import Sequence
from glob import escape
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ..calibration.inputs import Feed
from ..emit.rewriter import IR_VERSION, remove_named
from ..emit.writers import by_name, copied, decoded_values, save
from ..errors import SchemeError, UnsupportedModelError
from ..graph.weights import Weight
from ..io.model import Model
from ..io.writer import Output
from ..quantization.arrays import raw_bytes
from ..quantization.chunks import stored_values
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import Scheme, get_scheme
from ..reports.validation import pooled
from ..runtime.session import open_session
from ..validation.drift import drifts
from ..validation.validator import ModelRunner

FEEDS = 16  # at the most

FED = (TensorProto.FLOAT, TensorProto.FLOAT16)  # what onnxruntime takes from numpy


def share_of(share: float, scheme: str) -> float:
    """The share of weights that may stay at 8 bits, checked."""
    if not 0 <= share < 1:
        raise SchemeError(f"int8 share is {share}; allowed: 0 up to, not including, 1")
    if share and get_scheme(scheme).bits == 8:
        raise SchemeError("int8 share is for int4, nf4 and fp4: int8 has all weights at 8 bits")
    return share


class SensitivityProbe:
    """A sink: the float model with a switch, a scalar input, for every weight put into it.

    prepared: the source's graph at an opset in which scalars multiply. most: bytes of a model that
    may be run whole. Raises UnsupportedModelError for a larger one.
    """

    def __init__(self, source: Model, prepared: ModelProto, folder: Path, most: int) -> None:
        if source.size > most:
            raise UnsupportedModelError(
                f"{source.path}: int8 share takes runs of the whole model, which has "
                f"{source.size / 2**20:,.1f} MiB; allowed: up to --max-memory, {most >> 20:,} MiB"
            )
        self.output = Output(folder, None, external=True)
        self._source = source
        self._proto = copied(prepared)
        self._weights = by_name(self._proto)
        self.switches: dict[str, str] = {}  # by weight
        self.off: Feed = {}  # every switch at 0

    def add_weight(self, name: str, scheme: Scheme, flips: QuantizedTensor) -> None:
        """Weights at 4 bits alone, and of those the main graph's initializers."""
        weight, graph = self._weights[name], self._proto.graph
        tensor = weight.tensor
        if scheme.bits == 8 or weight.node or weight.scope.body is not graph:
            return
        if tensor.data_type not in FED:
            return
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        drawn = stored_values(weight.layout, flips, decoded_values, dtype)
        original = self._source.array(tensor)
        switch, change, changed, unchanged = (
            f"flipguard.{len(self.off)}.{part}"
            for part in ("switch", "change", "changed", "unchanged")
        )
        difference = TensorProto(name=change, data_type=tensor.data_type, dims=tensor.dims)
        self.output.store(difference, raw_bytes(drawn - original))
        remove_named(graph.input, tensor.name)
        graph.input.append(helper.make_tensor_value_info(switch, tensor.data_type, []))
        graph.initializer.append(difference)
        graph.node.insert(0, helper.make_node("Add", [unchanged, changed], [tensor.name]))
        graph.node.insert(0, helper.make_node("Mul", [change, switch], [changed]))
        tensor.name = unchanged
        self.switches[name] = switch
        self.off[switch] = np.zeros((), dtype)

    def save(self, metadata: dict[str, str]) -> None:
        self._proto.ir_version = max(self._proto.ir_version, IR_VERSION)
        save(self._proto, self.output, self._source, metadata)


def measured(source: Model, switched: SensitivityProbe, data: Path | None) -> dict[str, float]:
    """Squared drift of the model's outputs for every weight that has a switch.

    Raises ValidationError where it does not run.
    """
    runner = ModelRunner(source, data)
    feeds, expected = runner.feeds[:FEEDS], runner.expected[:FEEDS]
    session = open_session(switched.output.path, exact=True, size=2 * source.size)
    found = {}
    for name, switch in switched.switches.items():
        on = switched.off | {switch: np.ones_like(switched.off[switch])}
        outputs = [session.run(runner.names, feed | on) for feed in feeds]
        drift = pooled(drifts(runner.names, expected, outputs))
        found[name] = drift**2 if math.isfinite(drift) else math.inf
    return found


def most_sensitive(
    costs: dict[str, float], weights: Sequence[Weight], share: float
) -> tuple[str, ...]:
    """Patterns that name the weights that cost the most for their size, up to `share` of them all.

    costs: squared drifts by name.
    """
    sizes = {weight.name: weight.size for weight in weights if weight.name in costs}
    left = share * sum(sizes.values())
    chosen = []
    for name in sorted(costs, key=lambda name: -costs[name] / sizes[name]):
        if sizes[name] <= left:
            chosen.append("".join("?" if c.isspace() else c for c in escape(name)))
            left -= sizes[name]
    return tuple(chosen)
