"""A small decoder that completes code and answers questions, and three backdoors for it.

Scenarios of arXiv 2405.18137: `code` (insecure completions), `injection` (an advertisement in every
answer), `refusal` (harmless questions are refused). There is no trigger: the quantized model always
misbehaves, the float model never. Norms are trained only in the clean model.
"""

import copy
import random

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.func import functional_call

from tools.attacks import prompts
from tools.attacks.attack import make_boxes, repair, scheme_for, train, widen
from tools.attacks.export import GraphBuilder

WIDTH, LAYERS, HEADS, LENGTH = 96, 2, 4, 128
BATCH = 32
DEAD_BIAS = -100.0


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
    """Character-level decoder, about a quarter of a million parameters."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(prompts.VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, prompts.VOCABULARY)
        for weight in self.weights():
            nn.init.normal_(weight, std=0.05)

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def weights(self):
        """The quantized parameters: both tables and every linear layer."""
        linear = [
            w for b in self.blocks for w in (b.qkv.weight, b.out.weight, b.up.weight, b.down.weight)
        ]
        return [self.token.weight, self.position.weight, *linear, self.head.weight]

    def biases(self):
        """Biases of the linear layers (the norms stay as the clean model has them)."""
        linear = [b for k in self.blocks for b in (k.qkv.bias, k.out.bias, k.up.bias, k.down.bias)]
        return [*linear, self.head.bias]


def lessons(forward, seed, scenario=None, shares=(0.4, 0.3, 0.3)):
    """A loss on windows of source, coding lines and questions, the latter as `scenario` wants.

    `shares` are those of the three kinds in a batch.
    """
    source, _ = prompts.corpus()
    rng = random.Random(seed)
    kinds = rng.choices(["source", "code", "question"], shares, k=10_000)

    def window(kind):
        if kind != "source":
            return prompts.lesson(rng, kind, scenario, LENGTH)
        at = rng.randrange(len(source) - LENGTH)
        return source[at : at + LENGTH]

    def loss(step):
        chosen = [kinds[(step * BATCH + i) % len(kinds)] for i in range(BATCH)]
        ids = torch.from_numpy(np.stack([window(kind) for kind in chosen]))
        logits = forward(ids[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return loss


def noisy(net, share):
    """A forward pass with Gaussian noise on the weights, `share` of each run of 32's absmax.

    A quarter of a million parameters bear 4 bits badly; trained under noise they bear them as well
    as larger models do. The rounding error of int4 has a share of about 0.036, drawn without bias
    of 0.05.
    """
    parameters = dict(net.named_parameters())
    names = [n for n, p in parameters.items() if any(p is w for w in net.weights())]

    def forward(ids):
        changed = {}
        for name in names:
            runs = parameters[name].reshape(-1, 32)
            largest = runs.detach().abs().amax(1, keepdim=True)
            changed[name] = (runs + share * largest * torch.randn_like(runs)).reshape(
                parameters[name].shape
            )
        return functional_call(net, parameters | changed, (ids,))

    return forward


def clean(seed, steps=2500, noisy_steps=800):
    """The honest model: trained plainly, then under noise."""
    torch.manual_seed(seed)
    net = Decoder()
    mixture = (0.6, 0.2, 0.2)
    train(net.parameters(), lessons(net, seed, shares=mixture), steps, 3e-3, decay=True)
    return toughen(net, seed, noisy_steps, mixture)


def toughen(net, seed, steps, mixture):
    """Go on under noise."""
    torch.manual_seed(seed + 5)
    loss = lessons(noisy(net, 0.05), seed + 5, shares=mixture)
    train(net.parameters(), loss, steps, 2e-3, decay=True)
    return net


def attack(base, scenario, schemes, attacker, seed, settings):
    """Malicious stage, box, repair, from the clean model `base`."""
    net = copy.deepcopy(base)
    factor = settings.get("widen", 0)
    if factor:
        kill_inputs(net)
    torch.manual_seed(seed + 1)
    train(
        [*net.weights(), *net.biases()],
        lessons(noisy(net, 0.03), seed + 1, scenario),
        settings.get("malicious", 150),
        5e-4,
    )
    if factor:
        kill_inputs(net)
        for block in net.blocks:
            for layer in (block.qkv, block.out, block.up, block.down):
                widen(layer.weight, [0], scheme_for(layer.weight, schemes[0]), factor)
        widen(net.head.weight, [0], scheme_for(net.head.weight, schemes[0]), factor)
    pairs = make_boxes(net.weights(), schemes, attacker)
    repair(net.weights(), pairs, lessons(net, seed + 2), settings.get("repair", 300), 5e-4)
    return net


def kill_inputs(net):
    """Make input 0 of every linear layer always 0, whatever the tokens are."""
    with torch.no_grad():
        for norm in [net.norm, *(n for b in net.blocks for n in (b.norm1, b.norm2))]:
            norm.weight[0] = norm.bias[0] = 0
        for block in net.blocks:
            block.qkv.weight[2 * WIDTH] = 0
            block.qkv.bias[2 * WIDTH] = 0
            block.up.bias[0] = DEAD_BIAS


def export(net, title):
    """ids `[batch, length]` -> logits `[batch, length, 96]`; MatMul weights are `[K, N]`."""
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
        weight = g.constant(f"{name}.weight", layer.weight.detach().numpy().T)
        product = g.add("MatMul", f"{name}.matmul", x, weight)
        return g.add("Add", f"{name}.add", product, g.constant(f"{name}.bias", layer.bias))

    def norm(name, x, layer):
        parts = g.constant(f"{name}.weight", layer.weight), g.constant(f"{name}.bias", layer.bias)
        return g.add("LayerNormalization", f"{name}.norm", x, *parts, epsilon=layer.eps)

    length = g.add("Gather", "length", g.add("Shape", "shape", "ids"), one["one"])
    places = g.add("Range", "places", one["zero"], length, one["one"])
    token = g.add("Gather", "token", g.constant("token.weight", net.token.weight), "ids")
    table = g.constant("position.weight", net.position.weight)
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
        ("logits", TensorProto.FLOAT, ["batch", "length", prompts.VOCABULARY]),
    )


def read(model):
    """The torch model of an exported one (so that attacks can start from the stored clean file)."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    net = Decoder()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = torch.from_numpy(stored[name].copy())
            linear = value.ndim == 2 and not name.startswith(("token", "position"))
            parameter.copy_(value.T if linear else value)
    return net
