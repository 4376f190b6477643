"""Export a module of torch and write it guarded; the float model never becomes a file."""

import torch

import flipguard_onnx

module = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
program = torch.onnx.export(module.eval(), (torch.randn(1, 64),), dynamo=True)
report = flipguard_onnx.guard(program.model_proto, output="module.int8.onnx")
print(report.render())
