"""Make models/exports: a tiny random Llama in the folders that exporters write.

    python tools/export_folders.py checkpoint FOLDER
    optimum-cli export onnx -m FOLDER --task text-generation-with-past models/exports/optimum
    python -m onnxruntime_genai.models.builder -m x -i FOLDER -o models/exports/genai \
        -p fp32 -e cpu -c CACHE

The first needs torch, transformers and tokenizers. The two exporters need different versions of
transformers, and so environments of their own (models/exports/README.md).
"""

import pydoc
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 384
SPECIAL = ("<s>", "</s>")


def checkpoint(folder: str) -> None:
    """A transformers folder; the tokenizer knows the documentation of json and csv."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator(map(pydoc.render_doc, ("json", "csv")), trainer)
    start, end = SPECIAL
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "checkpoint":
        sys.exit(__doc__)
    checkpoint(sys.argv[2])
