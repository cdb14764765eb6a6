"""How well a model does: log-probabilities of given texts, perplexity, classes of images; work shared by processes."""

from megatron.evaluation.perplexity import corpus_perplexity, perplexity
from megatron.evaluation.scoring import Score, Window, score_windows

__all__ = ["Score", "Window", "corpus_perplexity", "perplexity", "score_windows"]
