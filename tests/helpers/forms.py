"""The number formats that laws and oracles are tested on: one of every rule and of every cut."""

import numpy as np

from flipguard_onnx.quantization.schemes import Blocks, Choice, Codebook, Float8, scheme_of

CHOICES = {
    "int8-channel": Choice("int8"),
    "int8-tensor": Choice("int8", "tensor"),
    "int8-block": Choice("int8", "block"),
    "uint8-channel": Choice("uint8"),
    "uint8-tensor": Choice("uint8", "tensor"),
    "uint8-block": Choice("uint8", "block"),
    "int4": Choice("int4"),
    "int4-7": Choice("int4", divisor=7),
    "uint4": Choice("uint4"),
    "int2": Choice("int2"),
    "uint2": Choice("uint2"),
    "nf4": Choice("nf4"),
    "fp4": Choice("fp4"),
    "fp8": Choice("fp8"),
    "mxfp4": Choice("mxfp4"),
    "nvfp4": Choice("nvfp4"),
}
MORE = {  # the same rules with other numbers
    "int8-reduced": Choice("int8", reduced=True),
    "uint8-reduced": Choice("uint8", "tensor", reduced=True),
    "uint8-127.5": Choice("uint8", divisor=127.5),
    "int4-7.5": Choice("int4", divisor=7.5),
    "int4-channel": Choice("int4", "channel"),
    "uint4-channel": Choice("uint4", "channel"),
    "int2-channel": Choice("int2", "channel"),
    "uint2-channel": Choice("uint2", "channel"),
    "fp8-tensor": Choice("fp8", "tensor"),
    "mxfp4-6": Choice("mxfp4", divisor=6),
}

SEARCHED = {  # scales depend on all weights of a block, not on its extremes alone
    "uint4-k_quant": Choice("uint4", divisor="k_quant"),
    "uint4-k_quant-128": Choice("uint4", "block", 128, "k_quant"),
    "uint8-k_quant": Choice("uint8", "block", divisor="k_quant"),
}

TWO_ZEROS = ("fp4", "mxfp4", "nvfp4")  # with codes for -0 and for 0


def scheme(form):
    return scheme_of((CHOICES | MORE | SEARCHED)[form])


def cut(form, rows, cols):
    """The blocks of a [rows, cols] tensor."""
    found = scheme(form)
    rows, cols = (1, rows * cols) if found.flat else (rows, cols)
    return Blocks(rows, cols, min(found.block_size or cols, cols))


def range_of(form):
    """The lowest and the highest code."""
    found = scheme(form)
    if isinstance(found, Float8):
        return -126, 126
    return (0, 15) if isinstance(found, Codebook) else (found.lowest, found.highest)


def stored(form, codes):
    """Codes as the file holds them, but for those of fp8."""
    found = scheme(form)
    if isinstance(found, Codebook):
        return found.stored[codes]
    return codes.astype(np.int16) - found.lowest if found.has_zeros else codes
