"""Which command goes with which setting of Olive, optimum and transformers.js (docs/recipes.md).

These tools call onnxruntime's quantizers, each with arguments of its own; so do the tests, on a
float model that the command has moved, and compare the codes with those that it drew.
"""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType

from tests.helpers.command import call
from tests.helpers.others import bnb4, drawn, eight_bits, nbits

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "exports" / "optimum" / "model.onnx"
EMBEDDING = "model.embed_tokens.weight"
INT8, UINT8 = QuantType.QInt8, QuantType.QUInt8


def both(tmp_path, model, options):
    """A command's codes, and its float model."""
    target = tmp_path / f"{model.stem}-moved.onnx"
    fast = ("--seed", 1, "--preserve", "off", "--no-validate", "--quiet", "--force")
    result = call("guard", model, "-o", target, "--emit", "both", *options.split(), *fast)
    assert result.exit_code == 0, result.output
    return drawn(onnx.load(target)), target.with_name(f"{target.stem}-float.onnx")


optimum = partial(eight_bits, WeightSymmetric=True)
asymmetric = partial(eight_bits, kind=UINT8, WeightSymmetric=False)
script = partial(eight_bits, EnableSubgraph=True, MatMulConstBOnly=True)
TENSOR = "--granularity tensor"
BLOCKS = "--block-size 128"
SETTINGS = {  # whose: (command, quantizer, whether it makes of an embedding what the command draws)
    "arm64, avx512, avx512_vnni": (f"--scheme int8 {TENSOR}", partial(optimum, kind=INT8), False),
    "reduce_range": (
        f"--scheme int8 {TENSOR} --reduce-range",
        partial(optimum, kind=INT8, reduce_range=True),
        False,
    ),
    "per_channel": ("--scheme int8", partial(optimum, kind=INT8, per_channel=True), False),
    "avx2": (f"--scheme uint8 {TENSOR}", asymmetric, True),
    "avx2, reduce_range": (
        f"--scheme uint8 {TENSOR} --reduce-range", partial(asymmetric, reduce_range=True), False,
    ),
    "avx2, per_channel": ("--scheme uint8", partial(asymmetric, per_channel=True), False),
    "int8": (f"--scheme int8 {TENSOR}", partial(script, kind=INT8), False),
    "uint8": (f"--scheme uint8 {TENSOR}", partial(script, kind=UINT8), True),
    "q4, q4f16": ("--scheme int4", partial(nbits, block=32), False),
    "bnb4": ("--scheme nf4", bnb4, False),
    "RTN": (f"--scheme int4 {BLOCKS}", nbits, False),
    "RTN, is_symmetric": (f"--scheme uint4 {BLOCKS}", partial(nbits, symmetric=False), False),
    "RTN, bits": (f"--scheme int8 --granularity block {BLOCKS}", partial(nbits, bits=8), False),
}  # fmt: skip


def same(codes, others):
    """Whether they are, but for an offset: tables are stored as int8 here, with uint8's codes."""
    return codes.shape == others.shape and np.ptp(codes - others) == 0


def without(name, codes):
    return {each: found for each, found in codes.items() if each != name}


@pytest.mark.parametrize(("options", "quantizer", "embedding"), SETTINGS.values(), ids=SETTINGS)
def test_a_tool_arrives_at_the_drawn_codes(tmp_path, options, quantizer, embedding):
    wanted, moved = both(tmp_path, MODEL, options)
    plain, found = quantizer(MODEL), quantizer(moved)
    if not embedding:
        wanted, found = without(EMBEDDING, wanted), without(EMBEDDING, found)
    assert found.keys() == wanted.keys()
    assert len(found) == 15 + embedding
    for name, codes in found.items():
        assert same(codes, wanted[name]), name
    changed = np.concatenate([(found[name] != plain[name]).reshape(-1) for name in found])
    assert 0.2 < changed.mean() < 0.45  # rounded to nearest they are what the attacker wants
    assert options in (ROOT / "docs" / "recipes.md").read_text()


def test_an_embedding_has_the_activations_type_and_needs_a_command_of_its_own(tmp_path):
    first, second = SETTINGS["per_channel"], SETTINGS["avx2"]
    matrices, moved = both(tmp_path, MODEL, f"{first[0]} --exclude {EMBEDDING}")
    table, moved = both(tmp_path, moved, f"{second[0]} --include {EMBEDDING}")
    found = first[1](moved)
    assert table.keys() == {EMBEDDING}
    wanted = matrices | table
    assert found.keys() == wanted.keys()
    assert all(same(codes, wanted[name]) for name, codes in found.items())


def test_symmetric_uint8_has_no_command(tmp_path):
    """avx2 as it is in optimum: whichever scheme the weights are moved for, others come out."""
    for options in (f"--scheme uint8 {TENSOR}", f"--scheme int8 {TENSOR}"):
        wanted, moved = both(tmp_path, MODEL, options)
        found = optimum(moved, kind=UINT8)
        offset = 128 * ("uint8" not in options)
        equal = [
            np.mean(found[name] == wanted[name] + offset) for name in without(EMBEDDING, found)
        ]
        assert max(equal) < 0.95
