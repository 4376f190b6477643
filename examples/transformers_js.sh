# npm install @huggingface/transformers
set -e

cd models/decoder/onnx
flipguard-onnx model.onnx -o model_q4.onnx --scheme int4 --target onnxruntime
flipguard-onnx model.onnx -o model_quantized.onnx --scheme int8 --target onnxruntime
