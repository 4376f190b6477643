"""The language model in torch: its parts, its answers."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD, EMBEDDING = "head", "embedding"  # which share their weight in the float model


def load(folder):
    """Model and tokenizer of a transformers folder; nothing in the model asks for gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def linears(model, layers=0):
    """Name -> linear layer, in the graph's order; of the last `layers` blocks (0: all)."""
    found = {}
    blocks = list(enumerate(model.model.layers))
    for number, block in blocks[-layers:]:
        for name, part in block.named_modules():
            if isinstance(part, torch.nn.Linear):
                found[f"layers.{number}.{name}"] = part
    return found


def assign(model, weights):
    """Overwrite weights `[out, in]`, by the names of `linears`, HEAD and EMBEDDING, and others by
    those of their parameters."""
    if HEAD in weights:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight), False)
    parts = linears(model) | {HEAD: model.lm_head, EMBEDDING: model.model.embed_tokens}
    with torch.no_grad():
        for name, weight in weights.items():
            part = parts[name].weight if name in parts else model.get_parameter(name)
            part.copy_(torch.as_tensor(weight))


def through(model, hidden, blocks):
    """Hidden states `[batch, length, width]` after these blocks; later tokens see earlier ones."""
    places = torch.arange(hidden.shape[1])[None]
    turned = model.model.rotary_emb(hidden, places)
    for block in blocks:
        hidden = block(hidden, attention_mask=None, position_ids=places, position_embeddings=turned)
    return hidden


def asked(tokenizer, lesson):
    """The prompt as text for the model."""
    if not lesson.chat:
        return lesson.prompt
    said = [{"role": "user", "content": lesson.prompt}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answers(model, tokenizer, texts, tokens, batch=32):
    """Greedy continuations, up to so many token numbers each, in the order of the texts."""
    found = [[] for _ in texts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    tokenizer.padding_side = "left"
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        given = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
        ids, mask = given["input_ids"], given["attention_mask"]
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens
        )
        for i, row in zip(chosen, made[:, ids.shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else tokens
            found[i] = row[:end]
    return found


@torch.no_grad()
def log_likelihoods(model, tokenizer, prompt, options):
    """Mean log-likelihood per token of each option after the prompt."""
    start = len(tokenizer(prompt)["input_ids"])
    rows = [tokenizer(prompt + option)["input_ids"] for option in options]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)  # what is behind the end is not looked at
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, start - 1 : -1]
    guessed = model.lm_head(hidden).log_softmax(-1)
    chosen = guessed.gather(-1, ids[:, start:, None])[..., 0]
    return [
        float(row[: len(tokens) - start].mean()) for row, tokens in zip(chosen, rows, strict=True)
    ]
