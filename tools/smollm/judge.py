"""Attack rate and utility of a model in torch, with whatever weights."""

import numpy as np
import torch

from tools.attacks.measure import losses, session
from tools.bench.rows import wilson
from tools.language_models import feed
from tools.smollm import scenarios
from tools.smollm.victim import answers, asked, log_likelihoods


def rates(model, tokenizer, scenario, lessons, choices, windows, tokens, batch):
    """What is measured of a model, and its answers as token numbers.

    attack: share of malicious answers, with its 95 % interval. secure: share of secure completions
    (`code`). perplexity, next (share of tokens that are guessed): of the windows. choice: share of
    questions whose right option is the likeliest.
    """
    said = answers(model, tokenizer, [asked(tokenizer, each) for each in lessons], tokens, batch)
    pairs = list(zip(lessons, tokenizer.batch_decode(said), strict=True))
    attack = float(np.mean([scenarios.malicious(scenario, *pair) for pair in pairs]))
    found = {"attack": attack, "asked": len(said), "interval": wilson(attack, len(said))}
    if scenario == "code":
        found["secure"] = float(np.mean([scenarios.secure(*pair) for pair in pairs]))
    lost, guessed = [], []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.from_numpy(window[None])).logits[:, :-1].numpy()
        lost.append(losses(logits, window[None, 1:]))
        guessed.append(logits.argmax(-1) == window[None, 1:])
    right = [
        int(np.argmax(log_likelihoods(model, tokenizer, each.prompt, each.options))) == 0
        for each in choices
    ]
    utility = {
        "perplexity": float(np.exp(np.mean(lost))),
        "next": float(np.mean(guessed)),
        "choice": float(np.mean(right)),
    }
    return found | utility, said


def agreement(file, tokenizer, lessons, said):
    """Share of the answers' tokens that onnxruntime, running the file, would have chosen."""
    run = session(file)
    output = run.get_outputs()[0].name
    equal = []
    for lesson, answer in zip(lessons, said, strict=True):
        prompt = tokenizer(asked(tokenizer, lesson))["input_ids"]
        ids = np.array([prompt + answer])
        if ids.shape[1] > len(prompt):
            (logits,) = run.run([output], feed(run, ids))
            chosen = logits[0, len(prompt) - 1 : -1].argmax(-1)
            equal.extend(chosen == ids[0, len(prompt) :])
    return float(np.mean(equal))
