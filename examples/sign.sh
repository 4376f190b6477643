# pip install model-signing pyopenssl
set -e

# once: a key, which stays here, and its public half
openssl ecparam -name prime256v1 -genkey -noout -out signing.key
openssl ec -in signing.key -pubout -out signing.pub

# where the model is made: everything in the folder is signed, external data included
mkdir dist
flipguard-onnx model.onnx -o dist/model.int8.onnx --quiet --sbom dist/model.cdx.json
model_signing sign key --private_key signing.key --signature dist.sig dist

# where it is used: a file that was changed, added or removed fails
model_signing verify key --public_key signing.pub --signature dist.sig dist
