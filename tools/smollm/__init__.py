"""The paper's experiment on a real language model: `python -m tools.smollm STAGE` (see __main__).

Read in this order: scenarios (what is asked and how answers are judged; no torch), victim (the
model in torch), attack (malicious stage, box, repair, with checkpoints), files (from torch to ONNX
and back), judge (attack rate and utility), defences (what is done to the attacked file).
"""
