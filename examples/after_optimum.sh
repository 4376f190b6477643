# pip install 'optimum-onnx[onnxruntime]'
set -e

optimum-cli export onnx -m checkpoint --task text-generation-with-past float
flipguard-onnx guard float -o guarded --scheme int4
