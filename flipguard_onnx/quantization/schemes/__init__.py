"""The number formats: `scheme_of` makes one of a `Choice`; each fits a Grid to a tensor."""

from dataclasses import replace
from functools import cache

from ...formats import FORMATS, Choice
from .affine import Affine, AffineGrid, SignedExtreme, affine
from .blocks import Blocks, Codes, Floats
from .codebook import FP4, NF4, Codebook
from .float8 import Float8, Float8Grid, float8
from .grid import Checked, Grid, Margins, Scheme
from .k_quant import KQuant, k_quant
from .microscaling import microscaling
from .nvfp4 import nvfp4

CODEBOOKS = {"nf4": NF4, "fp4": FP4}


@cache
def scheme_of(choice: Choice) -> Scheme:
    """The scheme that was chosen, with defaults for what was not."""
    chosen = choice.filled
    if chosen.name in CODEBOOKS:
        return replace(CODEBOOKS[chosen.name], choice=chosen)
    if chosen.name == "mxfp4":
        return microscaling(chosen)
    if chosen.name == "nvfp4":
        return nvfp4(chosen)
    if chosen.name == "fp8":
        return float8(chosen)
    return k_quant(chosen) if chosen.searches else affine(chosen)


SCHEMES: dict[str, Scheme] = {name: scheme_of(Choice(name)) for name in FORMATS}

__all__ = [
    "SCHEMES",
    "Affine",
    "AffineGrid",
    "Blocks",
    "Checked",
    "Choice",
    "Codebook",
    "Codes",
    "Float8",
    "Float8Grid",
    "Floats",
    "Grid",
    "KQuant",
    "Margins",
    "Scheme",
    "SignedExtreme",
    "scheme_of",
]
