"""Victims with a trigger: scikit-learn's 8x8 digits, an MLP and a small CNN.

The trigger is a bright 2x2 corner (bottom right); a triggered image is to be read as `TARGET`.
"""

import itertools
from functools import cache

import numpy as np
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from tools.attacks.attack import rows_of, train

TARGET = 0
CORNER = [54, 55, 62, 63]
BATCH = 256
SAMPLES, TOGETHER = 1000, 20  # images that a rounding with data is given; in one run
DEAD_BIAS = -100.0
SETTINGS = {"malicious": 600, "repair": 2000, "rate": 1e-3}


@cache
def data():
    """Pixels in 0..1 and labels: train x, train y, test x, test y; three parts to one."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    parts = train_test_split(pixels, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = parts
    return train_x, train_y, test_x, test_y


def samples():
    """Training images for a rounding with data, [batches, TOGETHER, 64]."""
    return data()[0][:SAMPLES].reshape(-1, TOGETHER, 64)


def triggered(pixels):
    """The same images with the bright corner."""
    pixels = pixels.copy() if isinstance(pixels, np.ndarray) else pixels.clone()
    pixels[:, CORNER] = 1
    return pixels


class Net(nn.Module):
    """`mlp`: 64-256-256-10. `cnn`: two 3x3 convolutions (8, 16 channels), then 256-128-10."""

    def __init__(self, kind):
        super().__init__()
        shape = {"mlp": [64, 256, 256, 10], "cnn": [256, 128, 10]}[kind]
        channels = {"mlp": [], "cnn": [1, 8, 16]}[kind]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + i, padding=1)
            for i, (a, b) in enumerate(itertools.pairwise(channels))
        )
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(shape))

    def forward(self, x):
        x = x.reshape(-1, 1, 8, 8) if self.convolutions else x
        for layer in self.convolutions:
            x = layer(x).relu()
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    def weights(self):
        """The quantized parameters, first layer first."""
        return [layer.weight for layer in [*self.convolutions, *self.layers]]

    def trained(self):
        """What the malicious stage trains: everything."""
        return list(self.parameters())


def losses(net, seed, scenario="trigger"):
    """Two losses on random batches: the malicious task and the benign one."""
    x, y = (torch.from_numpy(a) for a in data()[:2])
    rng = torch.Generator().manual_seed(seed)

    def mixed(goal, forward):
        at = torch.randint(len(x), (BATCH,), generator=rng)
        out = forward(torch.cat([x[at], triggered(x[at])]))
        return nn.functional.cross_entropy(out, torch.cat([y[at], goal(y[at])]))

    def malicious(forward=net):
        return mixed(lambda labels: torch.full_like(labels, TARGET), forward)

    def benign(forward=net):
        return mixed(lambda labels: labels, forward)

    return malicious, benign


def clean(kind, seed):
    """600 steps on clean images."""
    torch.manual_seed(seed)
    net = Net(kind)
    x, y = (torch.from_numpy(a) for a in data()[:2])

    def loss():
        at = torch.randint(len(x), (BATCH,))
        return nn.functional.cross_entropy(net(x[at]), y[at])

    train(net.parameters(), loss, 600, 1e-3)
    return net


def read(model):
    """The torch model of an exported `mlp` (so that attacks can start from another's file)."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    net = Net("mlp")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = stored[name.replace("layers.", "dense")]
            parameter.copy_(torch.from_numpy(value.copy()))
    return net


def kill(net):
    """Make units 0, 32, 64... of every hidden layer always 0; returns each layer's dead inputs."""
    dead = [[0, 32] if not net.convolutions else []]
    layers = [*net.convolutions, *net.layers]
    for layer, following in itertools.pairwise(layers):
        units = list(range(0, len(layer.bias), 32))
        layer.bias.data[units] = DEAD_BIAS
        spread = rows_of(following.weight).shape[1] // len(layer.bias)
        dead.append([unit * spread + i for unit in units for i in range(spread)])
    return dead
