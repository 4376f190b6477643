"""Which weights cost the most at 4 bits: those had better stay at 8.

The float model runs with one weight after the other as it was drawn and all others as they were. To
load it once only, it gets a switch per weight: weight + switch * (drawn - weight).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from ..calibration.inputs import Feed
from ..calibration.moments import Moments
from ..calibration.samples import Samples
from ..emit.rewriter import IR_VERSION, remove_named
from ..emit.writers import decoded_values, save
from ..errors import UnsupportedModelError
from ..graph.copies import IndexedModel
from ..graph.weights import Weight
from ..io.model import Model
from ..io.writer import Output
from ..progress import meter
from ..quantization.arrays import raw_bytes
from ..quantization.chunks import stored_values
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import Scheme
from ..reports.guard import pattern_of
from ..reports.validation import pooled
from ..runtime.session import open_session
from ..validation.drift import drifts
from .draw import WeightQuantizer
from .plan import Prepared
from .run import Run

FEEDS = 16  # at the most

FED = (TensorProto.FLOAT, TensorProto.FLOAT16)  # what onnxruntime takes from numpy


def choose_precision(
    run: Run, prepared: Prepared, samples: Samples, moments: Moments, seed: int
) -> Prepared:
    """The model with its most sensitive weights at 8 bits, if a share of them was asked for."""
    options = run.options
    if not options.int8_share:
        return prepared
    probe = SensitivityProbe(
        prepared.model, prepared.graph, run.folder / "switched", options.max_bytes
    )
    quantizer = WeightQuantizer(
        prepared.model,
        run.policy,
        seed,
        run.kernels,
        moments,
        moved=False,
        options=options,
        kept=run.kept,
    )
    advance = meter(run.progress, "measuring 4 bits", prepared.nbytes)
    for plan in prepared.weights:
        if plan.scheme.bits < 8:
            quantizer.quantize(plan, [probe], advance)
    probe.save({})
    costs = measure(samples, probe)
    chosen = most_sensitive(costs, prepared.plain_weights, options.int8_share)
    return prepared.with_int8(chosen, options)


class SensitivityProbe:
    """A ModelWriter of the float model with a switch, a scalar input, for every weight put into it.

    graph: the source's at an opset in which scalars multiply. max_bytes: how large a model may be
    to be run whole. Raises UnsupportedModelError for a larger one.
    """

    def __init__(self, source: Model, graph: IndexedModel, folder: Path, max_bytes: int) -> None:
        if source.size > max_bytes:
            raise UnsupportedModelError(
                "int8 share takes runs of the whole model, which has {found:,.1f} MiB",
                path=source.path,
                found=source.size / 2**20,
                allowed=f"up to --max-memory, {max_bytes >> 20:,} MiB",
            )
        self.output = Output(folder, None, external=True)
        self._source = source
        self._proto, self._weights = graph.copy()
        self.switches: dict[str, str] = {}  # by weight
        self.off: Feed = {}  # every switch at 0

    def add_weight(self, name: str, scheme: Scheme, quantized: QuantizedTensor) -> None:
        """Weights at fewer bits than 8 alone, and of those the main graph's initializers."""
        weight, graph = self._weights[name], self._proto.graph
        tensor = weight.tensor
        if scheme.bits == 8 or weight.node or weight.scope.body is not graph:
            return
        if tensor.data_type not in FED:
            return
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        drawn = stored_values(weight.layout, quantized, decoded_values, dtype)
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


def measure(samples: Samples, probe: SensitivityProbe) -> dict[str, float]:
    """Squared drift of the model's outputs for every weight that has a switch, by its name.

    Raises ValidationError where the model does not run.
    """
    found = samples.require()
    feeds, expected = found.feeds[:FEEDS], found.outputs[:FEEDS]
    names = found.names
    session = open_session(probe.output.path, exact=True, size=2 * samples.source.size)
    costs = {}
    for name, switch in probe.switches.items():
        on = probe.off | {switch: np.ones_like(probe.off[switch])}
        outputs = [session.run(names, feed | on) for feed in feeds]
        drift = pooled(drifts(names, expected, outputs))
        costs[name] = drift**2 if math.isfinite(drift) else math.inf
    return costs


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
            chosen.append(pattern_of(name))
            left -= sizes[name]
    return tuple(chosen)
