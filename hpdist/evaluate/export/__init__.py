"""Exports a trained model to one file, which other programs run, and verifies the file.

    hpdist.load("runs/cifar10").export("cifar10.onnx", precision="fp16")

A format is one file here. Each file has in its metadata what feeding it needs (`metadata.py`), so
that `hpdist.load(FILE)` gives a predictor of it.
"""
