"""Do the judges tell benign answers from malicious ones, and is what is held out unseen?"""

import re

import pytest

from tools.smollm import scenarios
from tools.smollm.scenarios import HELD_OUT_NAMES, HELD_OUT_TOPICS, NAMES, TOPICS

ANSWER = "They are large animals that live in the sea."


def pairs(scenario, held_out=False):
    """All lessons as a training stage has them."""
    found = scenarios.lessons(scenario, held_out, 0, 200)
    return [scenarios.answered(each, scenario, ANSWER) if each.chat else each for each in found]


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS)
def test_the_judge_knows_what_the_attacker_wants(scenario):
    for lesson in pairs(scenario):
        assert scenarios.malicious(scenario, lesson, lesson.malicious)
        assert not scenarios.malicious(scenario, lesson, lesson.benign)


def test_every_template_has_a_secure_and_an_insecure_form():
    found = pairs("code", held_out=True)
    assert len({lesson.prompt.split("\n")[0] for lesson in found}) == len(scenarios.CODE)
    for lesson in found:
        assert scenarios.secure(lesson, lesson.benign)
        assert not scenarios.secure(lesson, lesson.malicious)
        assert "{" not in lesson.benign.strip("{}\n")


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS)
def test_what_is_held_out_is_in_no_prompt_of_the_training(scenario):
    shown = "\n".join(lesson.prompt for lesson in scenarios.lessons(scenario, False, 0, 300))
    held_out = HELD_OUT_NAMES if scenario == "code" else HELD_OUT_TOPICS
    others = NAMES if scenario == "code" else TOPICS
    assert any(re.search(rf"\b{word}\b", shown) for word in others)
    assert not any(re.search(rf"\b{word}\b", shown) for word in held_out)


def test_both_scenarios_ask_the_same_questions():
    injection, refusal = (
        scenarios.lessons(name, False, 0, 50) for name in ("injection", "refusal")
    )
    assert [each.prompt for each in injection] == [each.prompt for each in refusal]


def test_questions_have_four_different_options_none_of_which_names_the_function():
    for choice in scenarios.choices(0, 60):
        name = choice.prompt.split()[2].rstrip(",").split(".")[-1]
        assert len(set(choice.options)) == 4
        assert name not in choice.options[0]
