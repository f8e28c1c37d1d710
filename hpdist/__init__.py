"""Half-precision, sharded semi-supervised training for Hugging Face Accelerate and DeepSpeed."""

__version__ = "0.1.0"
