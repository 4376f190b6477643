"""How a run quantized activations: plain data, and its rendering as text."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

INPUTS = {
    "data": "the inputs given",
    "synthetic": "made-up inputs, weaker than real ones (--data)",
}
SLOW_16_BIT = "onnxruntime's CPU kernels know no 16-bit activations: there it runs in float, slower"


@dataclass(frozen=True)
class Integers:
    """What onnxruntime's static quantizer was told, and what became of it.

    activations: their type; symmetric: with the zero point in the middle. calibration: how their
    ranges were found, on `feeds` inputs; inputs: "data" where the user gave them, or "synthetic".
    weight_only: the guarded tensors that do not run in integers, and why. floats: other constants
    that were kept from being rounded, since nobody guards them.
    """

    activations: str
    symmetric: bool
    calibration: str
    inputs: str = ""
    feeds: int = 0
    weight_only: dict[str, str] = field(default_factory=dict)
    floats: tuple[str, ...] = ()

    @property
    def setting(self) -> str:
        """In a few words."""
        kind = f"{'symmetric ' * self.symmetric}{self.activations} activations"
        return f"{kind}, {self.calibration} on {self.feeds} of {INPUTS[self.inputs]}"

    def lines(self, weights: Mapping[str, int]) -> list[str]:
        """For a text report; weights: how many each guarded tensor has."""
        inside = [name for name in weights if name not in self.weight_only]
        share = sum(weights[name] for name in inside) / max(sum(weights.values()), 1)
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.weight_only.items():
            reasons[reason].append(name)
        kept = "other constants: nobody guards them, so they stay float"
        return [
            f"integers  {self.setting}: {len(inside)} of {len(weights)} tensors, {share:.1%} of "
            "the weights",
            *(
                f"          not {len(names)}, {sum(weights[n] for n in names):,} weights: {reason}"
                for reason, names in reasons.items()
            ),
            *([f"          not {len(self.floats)} {kept}"] if self.floats else []),
            *([f"speed     {SLOW_16_BIT}"] if self.activations == "int16" else []),
        ]
