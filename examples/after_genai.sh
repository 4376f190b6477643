# pip install onnxruntime-genai torch transformers
set -e

python -m onnxruntime_genai.models.builder -i checkpoint -o float -p fp32 -e cpu -c cache
flipguard-onnx guard float -o guarded --scheme int4 --target onnxruntime
