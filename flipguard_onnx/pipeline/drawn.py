"""One weight after a draw, and as arrays that can be kept."""

import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..detection.alignment import budget
from ..io.kept import Arrays
from ..quantization.kernels.protocol import Scales
from ..quantization.kernels.scalar import Levels
from ..quantization.rounding import Policy, QuantizedTensor
from ..quantization.schemes import Blocks, Scheme
from ..reports.scan import Budget


@dataclass(frozen=True)
class Account:
    """What became of some weights.

    squared_errors, squares: sums over their changes and over the weights themselves.
    """

    budget: Budget
    squared_errors: float
    squares: float

    @classmethod
    def of(cls, values: npt.NDArray[Any], quantized: QuantizedTensor, policy: Policy) -> "Account":
        """Of flat weights [n] in canonical order."""
        weights = values.astype(np.float32, copy=False)
        errors = quantized.grid.decode(quantized.codes)
        errors -= weights
        squares = (float(np.einsum("i,i", x, x, dtype=np.float64)) for x in (errors, weights))
        return cls(budget(values, quantized, policy), *squares)

    def __add__(self, other: "Account") -> "Account":
        return Account(
            self.budget + other.budget,
            self.squared_errors + other.squared_errors,
            self.squares + other.squares,
        )

    @property
    def weight_error(self) -> float:
        """Relative L2 of the change."""
        return math.sqrt(self.squared_errors / self.squares) if self.squares else 0.0


@dataclass(frozen=True)
class DrawnWeight:
    """The codes of a weight and what is known of them.

    unfed: why errors were not fed forward in it; "" where they were, or nobody wanted that.
    """

    quantized: QuantizedTensor
    account: Account
    unfed: str

    def arrays(self) -> Arrays:
        """All of it, so that `from_arrays` gives the same; None is NaN."""
        quantized, grid = self.quantized, self.quantized.grid
        arrays: Arrays = {
            "tensor_scale": np.asarray(grid.tensor_scale),
            "nearest": quantized.nearest,
            "codes": quantized.codes,
            "products": np.array([quantized.gain, quantized.product_error], np.float64),
            "budget": np.array(astuple(self.account.budget)),
            "squares": np.array([self.account.squared_errors, self.account.squares]),
            "unfed": np.array(self.unfed),
        }
        for kind in (grid.scales, grid.levels):
            for name, part in kind._asdict().items():
                arrays[f"{type(kind).__name__}.{name}"] = np.asarray(part)
        if quantized.guarded is not None:
            arrays["guarded"] = quantized.guarded.view(np.uint8)  # bfloat16 is no type of numpy's
        return arrays

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, scheme: Scheme, blocks: Blocks, storage: np.dtype[Any]
    ) -> "DrawnWeight":
        """What `arrays` was made of. storage: the type of the weights."""
        parts: list[Any] = [arrays[f"Levels.{name}"][()] for name in Levels._fields]
        levels = Levels(int(parts[0]), *parts[1:])
        scales = Scales(*(arrays[f"Scales.{name}"] for name in Scales._fields))
        gain, error = (None if math.isnan(x) else x for x in arrays["products"].tolist())
        quantized = QuantizedTensor(
            scheme.grid_type(blocks, scales, levels, np.float32(arrays["tensor_scale"])),
            arrays["nearest"],
            arrays["codes"],
            None,
            arrays["guarded"].view(storage) if "guarded" in arrays else None,
            gain,
            error,
        )
        account = Account(Budget(*arrays["budget"].tolist()), *arrays["squares"].tolist())
        return cls(quantized, account, str(arrays["unfed"]))
