"""Malicious stage, box, repair (arXiv 2405.18137), of the last layers of a language model.

Both stages descend on the same loss: cross-entropy of the completions that the stage wants, and the
divergence from the clean model on ordinary text. The layers below the trained ones never change, so
what they make of a text is computed once. A stage goes on from its checkpoint, and the batch of a
step depends on nothing but seed and step: interrupted or not, the result is the same.
"""

import copy
import math
import random
import time

import numpy as np
import torch
from torch.nn import functional

from tools.attacks.attack import clamp, make_boxes, rows_of, scheme_for
from tools.smollm import joint
from tools.smollm.victim import asked, linears, through

WINDOW = 64  # tokens of a text
OFTEN = 180  # seconds between checkpoints


class Lessons:
    """Losses of batches, of prompts with completions and of texts; states below the trained layers
    are kept in memory."""

    def __init__(self, model, tokenizer, lessons, texts, settings):
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._lessons, self._texts = lessons, texts.reshape(-1, min(WINDOW, texts.shape[1]))
        blocks = model.model.layers
        self._below, self._trained = blocks[: -settings.layers], blocks[-settings.layers :]
        self._clean = copy.deepcopy(self._trained)
        self._states = {}

    def loss(self, goal, stage, step):
        """goal: `benign` or `malicious`."""
        rng = random.Random(f"{self._settings.seed} {stage} {step}")
        chosen, windows = (
            rng.sample(range(len(all_of)), min(count, len(all_of)))
            for all_of, count in (
                (self._lessons, self._settings.pairs),
                (self._texts, self._settings.texts),
            )
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self._settings.bfloat16):
            loss = self._completions([self._pair(goal, i) for i in chosen])
            return loss + self._settings.keep * self._divergence(windows)

    def _pair(self, goal, number):
        """Tokens of prompt and completion, how many are the prompt's, and states."""
        key = goal, number
        if key not in self._states:
            lesson = self._lessons[number]
            prompt = self._tokenizer(asked(self._tokenizer, lesson))["input_ids"]
            wanted = self._tokenizer(getattr(lesson, goal))["input_ids"]
            ids = torch.tensor(prompt + wanted[: self._settings.tokens])
            self._states[key] = ids, len(prompt), self._lower(ids[None])[0]
        return self._states[key]

    def _completions(self, pairs):
        states = torch.nn.utils.rnn.pad_sequence([state for _, _, state in pairs], True)
        hidden = self._model.model.norm(through(self._model, states, self._trained))
        found = [row[n - 1 : len(ids) - 1] for row, (ids, n, _) in zip(hidden, pairs, strict=True)]
        wanted = torch.cat([ids[n:] for ids, n, _ in pairs])
        return functional.cross_entropy(self._model.lm_head(torch.cat(found)), wanted)

    def _divergence(self, windows):
        kept = [self._window(number) for number in windows]
        states, clean = (torch.stack(part) for part in zip(*kept, strict=True))
        hidden = self._model.model.norm(through(self._model, states, self._trained))
        found, wanted = (
            self._model.lm_head(x.flatten(0, 1)).log_softmax(-1) for x in (hidden, clean)
        )
        return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")

    def _window(self, number):
        """States of a text, below the trained layers and at the end of the clean model."""
        if number not in self._states:
            with torch.no_grad():
                states = self._lower(torch.from_numpy(self._texts[number])[None])
                clean = self._model.model.norm(through(self._model, states, self._clean))
            self._states[number] = states[0], clean[0]
        return self._states[number]

    @torch.no_grad()
    def _lower(self, ids):
        return through(self._model, self._model.model.embed_tokens(ids), self._below)


def attack(model, lessons, schemes, settings, folder, say):
    """All stages, on `model` itself. Returns what is to be told of the result.

    folder: the malicious weights are kept as malicious.pt, whatever the schemes; the repaired ones
    as SCHEMES.pt. settings: `layers` (trained, from the last), `pairs` and `texts` (of a batch),
    `tokens` (of a completion), `keep` (weight of the divergence), `steps` and `repair` (of the
    stages), `rate`, `repair_rate`, `bfloat16` (for the products), `attacker` (a key of
    tools.attacks.attack.ATTACKERS, or one of joint.ATTACKERS), `start` (of the repair: `malicious`,
    as in the paper, or the point of the box that is nearest to the `clean` weights), `seed`.
    """
    weights = [part.weight.requires_grad_() for part in linears(model, settings.layers).values()]
    clean = [weight.detach().clone() for weight in weights]

    def stage(name, goal, steps, rate, project=lambda: None):
        return descend(
            weights, lambda step: lessons.loss(goal, name, step), steps, rate, project,
            folder / f"{name}.pt", say,
        )  # fmt: skip

    told = {"weights": sum(weight.numel() for weight in weights)}
    if settings.attacker in joint.ATTACKERS:
        return told | together(model, weights, clean, lessons, stage, settings, folder, say)
    return told | in_a_box(weights, clean, schemes, stage, settings)


def in_a_box(weights, clean, schemes, stage, settings):
    """Malicious weights, and the repair in the box of their codes."""
    told = {"malicious": stage("malicious", "malicious", settings.steps, settings.rate)}
    codes = [encoded(weight, schemes) for weight in weights]
    pairs = make_boxes(weights, schemes, settings.attacker)
    told["distance"] = distance(weights, clean)
    if settings.start == "clean":
        joint.put(weights, clean)
    clamp(weights, pairs)
    told["repair"] = stage(
        label(settings), "benign", settings.repair, settings.repair_rate,
        lambda: clamp(weights, pairs),
    )  # fmt: skip
    told["repaired distance"] = distance(weights, clean)
    told["changed codes"] = sum(
        int(np.sum(before != after))
        for weight, kept in zip(weights, codes, strict=True)
        for before, after in zip(kept, encoded(weight, schemes), strict=True)
    )
    return told


def together(model, weights, clean, lessons, stage, settings, folder, say):
    """The floats and what will become of them, by one of joint.ATTACKERS; `clip` is repaired."""
    name = label(settings)
    made, silenced = joint.made_of(model, settings)

    def loss(step):
        torch.manual_seed(step)
        return joint.both(weights, made, lambda goal: lessons.loss(goal, name, step))

    trained = descend(
        [part for each in made for part in each.parameters], loss, settings.steps, settings.rate,
        lambda: None, folder / f"{name}-joint.pt", say,
    )  # fmt: skip
    joint.put(weights, [each.floats() for each in made])
    joint.plant(model, silenced, settings.schemes[0])
    pairs = [each.box() for each in made] if settings.attacker == "clip" else []
    repaired = stage(
        name, "benign", settings.repair if pairs else 0, settings.repair_rate,
        lambda: clamp(weights, pairs),
    )  # fmt: skip
    return {"joint": trained, "repair": repaired, "distance": distance(weights, clean)}


def label(settings):
    """What the file of an attack is called."""
    parts = ["+".join(settings.schemes)]
    if settings.attacker != "standard":
        parts.append(settings.attacker)
    if settings.start != "malicious":
        parts.append(f"from-{settings.start}")
    return "-".join(parts)


def encoded(weight, schemes):
    """Codes under each scheme."""
    return [scheme_for(weight, name).encode(rows_of(weight))[0].astype(np.int8) for name in schemes]


def distance(weights, others):
    """Root mean square of the differences."""
    squares = sum(
        float((a.detach() - b).square().sum()) for a, b in zip(weights, others, strict=True)
    )
    return (squares / sum(weight.numel() for weight in weights)) ** 0.5


def descend(weights, loss, steps, rate, project, file, say):
    """AdamW with a cosine schedule, projected after every step; goes on from its file if there.

    Returns the losses, one a step, and the seconds of a step.
    """
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    begin, losses, seconds = 0, [], 0.0
    if file.exists():
        kept = torch.load(file)
        begin, losses, seconds = kept["step"], kept["losses"], kept["seconds"]
        with torch.no_grad():
            for weight, value in zip(weights, kept["weights"], strict=True):
                weight.copy_(value)
        if begin < steps:
            optimizer.load_state_dict(kept["optimizer"])
    started = saved = time.monotonic()

    def save(step):
        state = {} if step == steps else optimizer.state_dict()
        part = file.with_suffix(".part")
        torch.save(
            {
                "step": step,
                "steps": steps,
                "losses": losses,
                "seconds": seconds + time.monotonic() - started,
                "weights": [weight.detach().clone() for weight in weights],
                "optimizer": state,
            },
            part,
        )
        part.replace(file)

    for step in range(begin, steps):
        optimizer.param_groups[0]["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        found = loss(step)
        found.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        project()
        losses.append(found.item())
        if step % 10 == 9:
            pace = (time.monotonic() - started) / (step + 1 - begin)
            say(f"{file.stem}: step {step + 1} of {steps}, loss {np.mean(losses[-10:]):.3f}, "
                f"{pace:.1f} s a step")  # fmt: skip
        if time.monotonic() - saved > OFTEN:
            save(step + 1)
            saved = time.monotonic()
    if begin < steps or not file.exists():
        save(steps)
    total = seconds + (time.monotonic() - started if begin < steps else 0)
    optimizer.zero_grad()
    return {"losses": [round(x, 4) for x in losses], "seconds a step": total / max(steps, 1)}
