"""A small decoder, with one layer of attention, in the forms in which exporters write decoders."""

import numpy as np
from onnx import TensorProto, helper

from tests.helpers.samples import F, model, node, weights

VOCABULARY, WIDTH, PLACES = 50, 16, 70

INT64 = TensorProto.INT64


def decoder(
    cache=True, merged=False, tied=False, sharpness=1.0, length="sequence_length", ids=True
):
    """Adds up the tokens before, where the mask has them, and says what may follow.

    cache: takes the keys of earlier tokens, [batch, 1 head, past, WIDTH], and returns all of them
    in two caches; merged: ids and caches are read inside If; tied: the table is the
    transposed weight of the last layer. The larger sharpness, the surer of the next token. ids:
    takes token ids, and not the rows of the table.
    """
    table = weights((VOCABULARY, WIDTH), 1) * 20
    constants = {
        "places": weights((PLACES, WIDTH), 2) * 20,
        "query": weights((WIDTH, WIDTH), 3) * 5,
        "head": np.ascontiguousarray(table.T) * np.float32(sharpness),
        **{f"const.{n}": np.array([n], np.int64) for n in (0, 1, 2)},
        "big": np.float32(1e9),
        "one": np.float32(1),
    }
    nodes = [node("Transpose", "head", "table")] if tied else []
    if ids and not tied:
        constants["table"] = table
    embed = node("Gather", "table input_ids" if ids else "inputs_embeds", "embedded")
    if not ids:
        embed.op_type = "Identity"
    nodes += [
        *branched(merged, "embedded", [embed]),
        node("Gather", "places position_ids", "placed"),
        node("Add", "embedded placed", "hidden"),
        node("Unsqueeze", "hidden const.1", "new"),
    ]
    for kind in ("key", "value") if cache else ():
        nodes += branched(
            merged,
            f"present.0.{kind}",
            [node("Concat", f"past_key_values.0.{kind} new", f"present.0.{kind}", axis=2)],
            [node("Identity", "new", f"present.0.{kind}")],
        )
    keys, values = ("present.0.key", "present.0.value") if cache else ("new", "new")
    nodes += [
        node("Squeeze", f"{keys} const.1", "keys"),
        node("Squeeze", f"{values} const.1", "values"),
        node("MatMul", "hidden query", "queries"),
        node("Transpose", "keys", "across", perm=[0, 2, 1]),
        node("MatMul", "queries across", "scores"),
        node("Shape", "hidden", "length", start=1, end=2),
        node("Shape", "keys", "total", start=1, end=2),
        node("Concat", "total total", "square", axis=0),
        node("Expand", "one square", "all"),
        node("Trilu", "all", "causal", upper=0),
        node("Neg", "length", "first"),
        node("Slice", "causal first total const.0", "rows"),
        node("Cast", "attention_mask", "shown", to=F),
        node("Unsqueeze", "shown const.1", "shown.rows"),
        node("Mul", "rows shown.rows", "kept"),
        node("Sub", "kept one", "missing"),
        node("Mul", "missing big", "penalty"),
        node("Add", "scores penalty", "masked"),
        node("Softmax", "masked", "attention"),
        node("MatMul", "attention values", "context"),
        node("MatMul", "context head", "logits"),
    ]
    inputs = {
        "input_ids": (INT64, ["batch_size", length]),
        "inputs_embeds": (F, ["batch_size", length, WIDTH]),
        "attention_mask": (INT64, ["batch_size", "past_sequence_length + sequence_length"]),
        "position_ids": (INT64, ["batch_size", "sequence_length"]),
    }
    del inputs["inputs_embeds" if ids else "input_ids"]
    outputs = {"logits": (F, ["batch_size", "sequence_length", VOCABULARY])}
    if cache:
        for kind in ("key", "value"):
            shape = ["batch_size", 1, "past_sequence_length", WIDTH]
            inputs[f"past_key_values.0.{kind}"] = (F, shape)
            outputs[f"present.0.{kind}"] = (F, [*shape[:2], "total_sequence_length", WIDTH])
    if merged:
        inputs["use_cache_branch"] = (TensorProto.BOOL, [1])
    return model(nodes, inputs, outputs, constants)


def encoder(batch="batch_size", length="sequence_length"):
    """Adds up what the token ids and their types stand for, where the mask has them."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(
        [
            node("Gather", "table input_ids", "embedded"),
            node("Gather", "types token_type_ids", "typed"),
            node("Add", "embedded typed", "hidden"),
            node("Cast", "attention_mask", "shown", to=F),
            node("Unsqueeze", "shown axis", "rows"),
            node("MatMul", "rows hidden", "sums"),
            node("MatMul", "sums head", "y"),
        ],
        dict.fromkeys(names, (INT64, [batch, length])),
        {"y": (F, None)},
        {
            "table": weights((VOCABULARY, WIDTH), 1),
            "types": weights((2, WIDTH), 2),
            "head": weights((WIDTH, WIDTH), 3),
            "axis": np.array([1], np.int64),
        },
    )


def branched(merged, name, with_past, without=None):
    """The nodes, or an If that has them in both branches, or others where there is no past."""
    if not merged:
        return with_past
    branches = {}
    for branch, nodes in (("then_branch", with_past), ("else_branch", without or with_past)):
        last = f"{name}.{branch}"
        inner = [helper.make_node(n.op_type, n.input, [last], **attributes(n)) for n in nodes]
        value = helper.make_tensor_value_info(last, F, None)
        branches[branch] = helper.make_graph(inner, branch, [], [value])
    return [helper.make_node("If", ["use_cache_branch"], [name], **branches)]


def attributes(made):
    return {each.name: helper.get_attribute_value(each) for each in made.attribute}
