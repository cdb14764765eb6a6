"""Using a trained model: loading and text generation."""

from megatron.inference.generate import Completion, generate
from megatron.inference.load import load_model

__all__ = ["Completion", "generate", "load_model"]
