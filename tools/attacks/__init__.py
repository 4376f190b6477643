"""Trainers of quantization-conditioned backdoors: the bench on which flipguard-onnx is judged.

Read in this order: quantizers (what onnxruntime will do to a weight), boxes (how far a weight may
move before it notices), attack (malicious stage, box, repair), digits and language_model (the
victims), clipping and outlier (what a grid clips, and what outliers wipe out), rounding_aware and
gptq_aware (attackers who know the defence), export, simulate (what quantization makes of a file),
measure (the judge), train.
"""
