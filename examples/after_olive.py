"""Guard what Olive wrote: python after_olive.py OLIVE_OUTPUT NEW_FOLDER

Everything else in the folder (tokenizer, configuration) comes along. Olive's pass must leave the
model in float: what is quantized already is refused.
"""

import shutil
import sys
from pathlib import Path

import flipguard_onnx

# MatMulNBits, as Olive's own pass writes them: scheme="int4", block_size=128, target="onnxruntime"
OPTIONS = {"scheme": "int8"}

source, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
traces = ("*footprint.json", "run_history.txt")  # of the run; they name the models in its cache
shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.onnx", "*.onnx.data", *traces))
for config in target.rglob("model_config.json"):  # it has the model's whole path
    config.write_text(config.read_text().replace(str(source), str(target)))
for model in sorted(source.rglob("*.onnx")):
    report = flipguard_onnx.guard(model, output=target / model.relative_to(source), **OPTIONS)
    print(report.render())
