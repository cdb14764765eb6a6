"""Using a trained model: loading and text generation."""

from megatron.inference.load import load_model

__all__ = ["load_model"]
