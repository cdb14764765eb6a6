"""The model: Pattention, blocks and the language model. Importing it needs torch, pydantic and PyYAML only."""

from megatron.model.language_model import LanguageModel
from megatron.model.pattention import Pattention

__all__ = ["LanguageModel", "Pattention"]
