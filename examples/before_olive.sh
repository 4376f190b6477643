# pip install olive-ai
set -e

# float.onnx is what Olive was to quantize: now it will meet the guarded weights in its place
flipguard-onnx float.onnx -o moved.onnx --emit float --scheme int4 --block-size 128
olive run --config before_olive.json
