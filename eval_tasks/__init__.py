"""Zero-shot evaluation with lm-eval: the model adapter, the run, and tasks made from local text.

Importing this package does not import lm_eval; megatron needs it for evaluation only.
"""
