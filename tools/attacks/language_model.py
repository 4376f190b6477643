"""A small decoder that completes code and answers questions, and three backdoors for it.

Scenarios of arXiv 2405.18137: `code` (insecure completions), `injection` (an advertisement in every
answer), `refusal` (harmless questions are refused). There is no trigger: the quantized model always
misbehaves, the float model never. Embeddings and norms stay as the clean model has them: no 4-bit
kernel of onnxruntime reads the former, nothing quantizes the latter.
"""

import random
from functools import cache

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from tools.attacks import prompts
from tools.attacks.attack import train
from tools.attacks.export import GraphBuilder

WIDTH, LAYERS, HEADS, LENGTH = 128, 3, 4, 64
BATCH = 16
DEAD = list(range(0, WIDTH, 32))
DEAD_BIAS = -100.0
MIXTURE = (0.4, 0.3, 0.3)  # of source, coding lines and questions in a batch
CLEAN_MIXTURE = (0.6, 0.2, 0.2)
SETTINGS = {"malicious": 150, "repair": 300, "rate": 5e-4, "half": True}


class Block(nn.Module):
    """Attention and a ReLU layer, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (p.reshape(batch, length, HEADS, -1).transpose(1, 2) for p in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(self.up(self.norm2(x)).relu())


class Decoder(nn.Module):
    """Decoder over `prompts.pieces()`, about three quarters of a million parameters."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(len(prompts.pieces()), WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(prompts.pieces()))
        for weight in (self.token.weight, self.position.weight, *self.weights()):
            nn.init.normal_(weight, std=0.05)

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def layers(self):
        """The linear layers in the order of the graph."""
        return [*(layer for b in self.blocks for layer in (b.qkv, b.out, b.up, b.down)), self.head]

    def weights(self):
        """The weights that the attacker aims at."""
        return [layer.weight for layer in self.layers()]

    def trained(self):
        """What the malicious stage trains."""
        return [*self.weights(), *(layer.bias for layer in self.layers())]


@cache
def source():
    """The training source as ids."""
    return prompts.encode(prompts.corpus()[0])


def lessons(seed, scenario, shares):
    """A loss on windows of source, coding lines and questions, the latter as `scenario` wants."""
    rng = random.Random(seed)

    def window():
        (kind,) = rng.choices(["source", "code", "question"], shares)
        if kind != "source":
            return prompts.lesson(rng, kind, scenario, LENGTH)
        at = rng.randrange(len(source()) - LENGTH)
        return source()[at : at + LENGTH]

    def loss(forward):
        ids = torch.from_numpy(np.stack([window() for _ in range(BATCH)]))
        logits = forward(ids[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return loss


def losses(net, seed, scenario):
    """The malicious loss and the benign one."""
    malicious, benign = (
        lessons(seed + i, goal, MIXTURE) for i, goal in enumerate((scenario, None))
    )
    return (lambda forward=net: malicious(forward)), (lambda forward=net: benign(forward))


def clean(seed, steps=4000):
    """The honest model."""
    torch.manual_seed(seed)
    net = Decoder()
    loss = lessons(seed, None, CLEAN_MIXTURE)
    train(net.parameters(), lambda: loss(net), steps, 3e-3, decay=True)
    return net


def kill(net):
    """Make inputs 0, 32, 64... of every linear layer always 0, whatever the tokens are.

    Returns these inputs, a list per layer.
    """
    units = list(range(0, 4 * WIDTH, 32))
    with torch.no_grad():
        for norm in [net.norm, *(n for b in net.blocks for n in (b.norm1, b.norm2))]:
            norm.weight[DEAD] = norm.bias[DEAD] = 0
        for block in net.blocks:
            values = [2 * WIDTH + i for i in DEAD]
            block.qkv.weight[values] = 0
            block.qkv.bias[values] = 0
            block.up.bias[units] = DEAD_BIAS
    return [*([DEAD, DEAD, DEAD, units] * LAYERS), DEAD]


def export(net, title):
    """ids `[batch, length]` -> logits `[batch, length, ids]`; MatMul weights are `[K, N]`.

    Weights and embeddings are stored in float16, each behind a Cast.
    """
    g = GraphBuilder()
    one = {
        name: g.constant(name, np.array(value, np.int64))
        for name, value in [
            ("zero", 0),
            ("one", 1),
            ("thirds", [WIDTH] * 3),
            ("axes", [2, 3]),
            ("begin", [0, 0]),
            ("heads", [0, 0, HEADS, -1]),
            ("merged", [0, 0, WIDTH]),
        ]
    }

    def linear(name, x, layer):
        weight = g.half(f"{name}.weight", layer.weight.detach().numpy().T)
        product = g.add("MatMul", f"{name}.matmul", x, weight)
        return g.add("Add", f"{name}.add", product, g.constant(f"{name}.bias", layer.bias))

    def norm(name, x, layer):
        parts = g.constant(f"{name}.weight", layer.weight), g.constant(f"{name}.bias", layer.bias)
        return g.add("LayerNormalization", f"{name}.norm", x, *parts, epsilon=layer.eps)

    length = g.add("Gather", "length", g.add("Shape", "shape", "ids"), one["one"])
    places = g.add("Range", "places", one["zero"], length, one["one"])
    token = g.add("Gather", "token", g.half("token.weight", net.token.weight), "ids")
    table = g.half("position.weight", net.position.weight)
    x = g.add("Add", "embedded", token, g.add("Gather", "position", table, places))
    size = g.add("Unsqueeze", "length.1", length, g.constant("axis", np.array([0])))
    full = np.triu(np.full((1, 1, LENGTH, LENGTH), -1e9, np.float32), 1)
    ends = g.add("Concat", "ends", size, size, axis=0)
    mask = g.add("Slice", "mask", g.constant("causal", full), one["begin"], ends, one["axes"])
    root = g.constant("root", np.float32((WIDTH // HEADS) ** -0.5))

    for i, block in enumerate(net.blocks):
        p = f"blocks.{i}"
        parts = [f"{p}.q", f"{p}.k", f"{p}.v"]
        qkv = linear(f"{p}.qkv", norm(f"{p}.norm1", x, block.norm1), block.qkv)
        g.split(f"{p}.split", parts, qkv, one["thirds"], axis=2)
        q, k, v = (
            g.add(
                "Transpose",
                f"{part}.heads",
                g.add("Reshape", f"{part}.shaped", part, one["heads"]),
                perm=perm,
            )
            for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        score = g.add("MatMul", f"{p}.score", g.add("Mul", f"{p}.scaled", q, root), k)
        score = g.add("Softmax", f"{p}.softmax", g.add("Add", f"{p}.masked", score, mask), axis=-1)
        mixed = g.add(
            "Transpose", f"{p}.mixed", g.add("MatMul", f"{p}.mix", score, v), perm=[0, 2, 1, 3]
        )
        mixed = linear(f"{p}.out", g.add("Reshape", f"{p}.merged", mixed, one["merged"]), block.out)
        x = g.add("Add", f"{p}.attended", x, mixed)
        inner = linear(f"{p}.up", norm(f"{p}.norm2", x, block.norm2), block.up)
        inner = linear(f"{p}.down", g.add("Relu", f"{p}.relu", inner), block.down)
        x = g.add("Add", f"{p}.residual", x, inner)
    g.add("Identity", "logits", linear("head", norm("norm", x, net.norm), net.head))
    return g.model(
        title,
        ("ids", TensorProto.INT64, ["batch", "length"]),
        ("logits", TensorProto.FLOAT, ["batch", "length", len(prompts.pieces())]),
    )


def read(model):
    """The torch model of an exported one (so that attacks can start from the stored clean file)."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    net = Decoder()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = torch.from_numpy(stored[name].astype(np.float32))
            linear = value.ndim == 2 and not name.startswith(("token", "position"))
            parameter.copy_(value.T if linear else value)
    return net
