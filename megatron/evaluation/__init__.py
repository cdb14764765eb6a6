"""How well a model predicts given texts: log-probabilities, perplexity, and the work shared by processes."""

from megatron.evaluation.perplexity import corpus_perplexity, perplexity
from megatron.evaluation.scoring import Score, Window, score_windows

__all__ = ["Score", "Window", "corpus_perplexity", "perplexity", "score_windows"]
