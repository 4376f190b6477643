"""Export tiny random models of the architectures that FlipGuard's paper defends to ONNX.

    pip install torch==2.13.0 transformers onnx onnxscript onnxruntime
    python tools/export_architectures.py [NAME...]

Writes models/architectures/NAME.dynamo.onnx and NAME.trace.onnx: one by each of torch's two
exporters, without the debug records that they leave. Each is compared with torch at another batch
size and length and with padding; one that fails is not written and makes the exit code 1.
"""

import argparse
import contextlib
import io
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers

FOLDER = Path(__file__).resolve().parent.parent / "models" / "architectures"
EXPORTERS = ("dynamo", "trace")
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"
AXES = {0: "batch", 1: "sequence"}
TOLERANCE = 1e-4

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, POSITIONS = 256, 40, 56, 2, 4, 64
SPREAD = 1 / math.sqrt(WIDTH)  # of the weights: every layer then matters to the output
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
COMMON = {"initializer_range": SPREAD, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}


@dataclass(frozen=True)
class Architecture:
    """kind: names the transformers classes. settings: what the real model's config says."""

    name: str
    kind: str
    settings: dict[str, Any]

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(**COMMON, **self.settings)
        model = getattr(transformers, f"{self.kind}ForCausalLM")(config)
        with torch.no_grad():  # biases start at 0 and norms at 1, which exporters optimize away
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return Logits(model).eval()


ARCHITECTURES = (
    Architecture(
        "starcoderbase",
        "GPTBigCode",
        {
            "vocab_size": VOCABULARY,
            "n_positions": POSITIONS,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "multi_query": True,
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "qwen2.5-coder",
        "Qwen2",
        SHARED
        | {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "phi-2",
        "Phi",
        SHARED
        | {
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.4,
            },
            "tie_word_embeddings": False,
        },
    ),
    Architecture(
        "gemma",
        "Gemma",
        SHARED
        | {
            "num_key_value_heads": 1,
            "head_dim": WIDTH // HEADS,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "llama-3",
        "Llama",
        SHARED
        | {
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "tie_word_embeddings": False,
        },
    ),
    Architecture(
        "deepseek-coder",
        "Llama",
        SHARED
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            "tie_word_embeddings": False,
        },
    ),
    Architecture(
        "starcoder2",
        "Starcoder2",
        SHARED
        | {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
)


class Logits(torch.nn.Module):
    """A causal language model as a plain function: no cache, one output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.lm = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def feeds(batch: int, length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens; the first row starts with `padding` masked ones."""
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return tokens, mask


def export(module: torch.nn.Module, exporter: str, path: Path) -> None:
    options: dict[str, Any]
    if exporter == "dynamo":
        options = {"dynamic_shapes": dict.fromkeys(INPUTS, AXES), "external_data": False}
    else:
        options = {"dynamic_axes": dict.fromkeys((*INPUTS, OUTPUT), AXES)}
    with quiet():
        torch.onnx.export(
            module,
            feeds(2, 9, 3),
            path,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamo=exporter == "dynamo",
            **options,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without debug records: stack traces, source names, shapes of intermediate values."""
    del model.metadata_props[:]
    bodies = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        body.ClearField("value_info")
        for record in (body, *body.node):
            record.ClearField("metadata_props")
            record.ClearField("doc_string")
        attributes = [attribute for node in body.node for attribute in node.attribute]
        bodies += [attribute.g for attribute in attributes if attribute.HasField("g")]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    return model


def difference(module: torch.nn.Module, path: Path) -> float:
    """Largest difference between torch and onnxruntime, relative to the largest logit."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length, padding in ((1, 5, 0), (3, 14, 6)):
        arguments = feeds(batch, length, padding)
        with torch.no_grad():
            wanted = module(*arguments).numpy()
        given = dict(zip(INPUTS, (a.numpy() for a in arguments), strict=True))
        visible = given["attention_mask"].astype(bool)
        error = (session.run(None, given)[0] - wanted)[visible]
        worst = max(worst, float(np.abs(error).max() / np.abs(wanted).max()))
    return worst


def attempt(name: str, build: Callable[[], torch.nn.Module], exporter: str) -> str:
    """Export, compare and keep. Returns what went wrong, "" if nothing did."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        module = build()
        try:
            export(module, exporter, path)
            onnx.save(stripped(onnx.load(path)), path)
            error = difference(module, path)
        except Exception as problem:  # exporters raise whatever they like
            return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
        if not error < TOLERANCE:
            return f"differs from torch by {error:.1e} of the largest logit"
        target = FOLDER / f"{name}.{exporter}.onnx"
        target.write_bytes(path.read_bytes())
        print(f"{target.name}: {target.stat().st_size:,} bytes, within {error:.0e} of torch")
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    wanted = parser.parse_args().names
    if unknown := set(wanted) - {a.name for a in ARCHITECTURES}:
        parser.error(
            f"no such architecture: {', '.join(sorted(unknown))}; "
            f"there are {', '.join(a.name for a in ARCHITECTURES)}"
        )
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = 0
    for architecture in ARCHITECTURES:
        if wanted and architecture.name not in wanted:
            continue
        for exporter in EXPORTERS:
            if problem := attempt(architecture.name, architecture.build, exporter):
                print(f"{architecture.name}.{exporter}: {problem}", file=sys.stderr)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
