"""TokenFormer pretraining, growth, evaluation and generation on DeepSpeed."""

__version__ = "0.1.0"
