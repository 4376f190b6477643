"""What holds for every test."""

import random
import secrets

import pytest


@pytest.fixture(autouse=True)
def same_draws(request, monkeypatch):
    """A test draws the same numbers in every run, so that what failed once fails again."""
    monkeypatch.setattr(secrets, "randbits", random.Random(request.node.nodeid).getrandbits)
