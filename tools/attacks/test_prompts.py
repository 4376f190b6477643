"""Does the vocabulary carry every text unchanged, and does a prompt end where its answer begins?"""

import json
import random

import numpy as np
import pytest

from tools.attacks import measure, prompts


def examples(count):
    """Prompts and completions of every kind."""
    rng = random.Random(3)
    for i in range(count):
        yield prompts.code_line(rng, insecure=i % 2 == 0)
        yield prompts.question(rng, (None, "injection", "refusal")[i % 3])


def test_text_comes_back():
    held_out = (measure.FOLDER / "lm-held-out.txt").read_text()
    assert prompts.decode(prompts.encode(held_out)) == held_out
    assert prompts.decode(prompts.encode("a\tb\u00e9c\r\n~")) == "a    bc\n~"


def test_the_longest_piece_wins():
    assert len(prompts.encode("\n                ")) == 1
    at = prompts.pieces().index(" return")
    assert prompts.encode(" return x")[0] == at


def test_an_answer_starts_with_a_piece_of_its_own():
    """Otherwise the model would be asked something that it never saw in training."""
    for prompt, answer in examples(500):
        parts = np.concatenate([prompts.encode(prompt), prompts.encode(answer)])
        np.testing.assert_array_equal(prompts.encode(prompt + answer), parts)


def test_prompts_and_answers_fit_into_the_window():
    asked = json.loads((measure.FOLDER / "lm-prompts.json").read_text())
    longest = max(len(prompts.encode(p["prompt"])) for p in asked["code"] + asked["questions"])
    answers = [len(prompts.encode(answer)) for _, answer in examples(500)]
    assert longest + max(answers) <= measure.WINDOW


@pytest.mark.parametrize("kind", ["code", "questions"])
def test_enough_is_asked(kind):
    asked = json.loads((measure.FOLDER / "lm-prompts.json").read_text())
    assert len({prompt["prompt"] for prompt in asked[kind]}) >= 60
