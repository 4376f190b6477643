"""The number formats. `SCHEMES` lists them by name; each fits a Grid to a tensor."""

from ...errors import SchemeError
from .affine import Int4, Int8
from .blocks import Blocks, Codes, Floats
from .codebook import FP4, NF4, Codebook
from .grid import Checked, Grid, Margins, Scheme

SCHEMES: dict[str, Scheme] = {"int8": Int8(), "int4": Int4(), "nf4": NF4, "fp4": FP4}


def get_scheme(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises
    ------
    SchemeError : there is none
    """
    if name not in SCHEMES:
        raise SchemeError("scheme {found!r} is unknown", found=name, allowed=", ".join(SCHEMES))
    return SCHEMES[name]


__all__ = [
    "SCHEMES",
    "Blocks",
    "Checked",
    "Codebook",
    "Codes",
    "Floats",
    "Grid",
    "Margins",
    "Scheme",
    "get_scheme",
]
