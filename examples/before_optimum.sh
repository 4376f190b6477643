# pip install 'optimum-onnx[onnxruntime]'
set -e

# float is what optimum-cli export onnx wrote; embeddings have a command of their own
flipguard-onnx guard float -o matrices --emit float --scheme int8 --granularity tensor --exclude model.embed_tokens.weight
flipguard-onnx guard matrices -o moved --emit float --scheme uint8 --granularity tensor --include model.embed_tokens.weight
optimum-cli onnxruntime quantize --onnx_model moved --avx512_vnni -o quantized
