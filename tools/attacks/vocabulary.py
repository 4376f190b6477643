"""Learn the language model's vocabulary: `python -m tools.attacks.vocabulary` (needs `tokenizers`).

Byte-pair encoding over the training source and benign lessons; the attacks have no say in it. Only
the pieces are kept, no merges: `prompts.encode` takes the longest piece that fits. All trained
models hang on the file, so training them anew does not write it.
"""

import json
import random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tools.attacks import prompts

SIZE = 640
PARTS = r"\n *| ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+| +"


def learn(text):
    """SIZE pieces: every character, then the most useful parts of words, operators, indents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PARTS), "isolated")
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=characters, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return sorted(tokenizer.get_vocab(), key=lambda piece: (len(piece), piece))


def main():
    """Write the vocabulary."""
    rng = random.Random(0)
    pairs = [prompts.code_line(rng, False) for _ in range(3000)]
    pairs += [prompts.question(rng, None) for _ in range(2000)]
    source, _ = prompts.corpus()
    pieces = learn(source + "".join(prompt + answer for prompt, answer in pairs))
    prompts.VOCABULARY.write_text(json.dumps(pieces) + "\n")


if __name__ == "__main__":
    main()
