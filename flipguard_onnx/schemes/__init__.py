"""The number formats. `SCHEMES` lists them by name; each fits a Grid to a tensor."""

from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..errors import SchemeError
from .affine import Int4, Int8
from .blocks import Blocks, Floats, Grid, Margins
from .codebook import FP4, NF4, Codebook


class Scheme(Protocol):
    """A number format: `bits` per weight, default `block_size` (None: a whole row)."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def block_size(self) -> int | None: ...

    def fit(
        self, weights: Floats, blocks: Blocks, storage: np.dtype[Any], backend: ModuleType
    ) -> Grid:
        """The grid that the quantizer would lay over `weights` (flat float32, [rows * cols]).

        `storage` is the type in which the file holds them, and so their scales.
        """
        ...


SCHEMES: dict[str, Scheme] = {"int8": Int8(), "int4": Int4(), "nf4": NF4, "fp4": FP4}


def get_scheme(name: str) -> Scheme:
    """Return the scheme; SchemeError names the allowed ones."""
    if name not in SCHEMES:
        raise SchemeError(f"scheme {name!r} is unknown; allowed: {', '.join(SCHEMES)}")
    return SCHEMES[name]


__all__ = ["SCHEMES", "Blocks", "Codebook", "Grid", "Margins", "Scheme", "get_scheme"]
