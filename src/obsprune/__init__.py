"""Make pretrained Hugging Face checkpoints sparse."""

__version__ = "0.1.0"
