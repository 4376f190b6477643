"""What the tool knows of every operator."""

from onnx import AttributeProto, TensorProto

FOUR_BIT_OPS = ("MatMul", "Gemm")

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")

CONVOLUTIONS = ("Conv", "ConvTranspose")

REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")  # by onnxruntime, when it loads a QDQ graph

# Weight inputs by operator; the order decides whose layout a shared tensor gets.
ROLES = {
    "MatMul": (1, 0),
    "Gemm": (1,),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}

CHAIN = ("Identity", "Transpose", "Cast")  # a weight is followed through these

STANDARD = ("", "ai.onnx")  # domains of the standard operators

VIEWS = ("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten")

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

# What is read of the standard operators: at least so many inputs, and attributes of these types.
INPUTS = {
    "MatMul": 2,
    "Gemm": 2,
    "Conv": 2,
    "ConvTranspose": 2,
    "LSTM": 3,
    "GRU": 3,
    "RNN": 3,
    "Gather": 2,
    "BatchNormalization": 5,
    **dict.fromkeys(("Identity", "Transpose", "Cast", "Slice", "Split", "Concat"), 1),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Reshape", "Flatten"), 1),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), 2),
    "Constant": 0,
}

ATTRIBUTES = {
    **dict.fromkeys(("perm", "strides", "dilations", "pads"), AttributeProto.INTS),
    **dict.fromkeys(("axis", "to", "transA", "transB", "group"), AttributeProto.INT),
    **dict.fromkeys(("alpha", "beta"), AttributeProto.FLOAT),
    "auto_pad": AttributeProto.STRING,
    "value": AttributeProto.TENSOR,
}

HOLDERS = {"alpha": ("Gemm",), "beta": ("Gemm",), "axis": ("Gather",), "value": ("Constant",)}

DATA = {"MatMul": 0, "Gemm": 0, "Conv": 0, "ConvTranspose": 0, "Gather": 1}  # input that varies
