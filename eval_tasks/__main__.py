"""The lm_eval command with one more model:

python -m eval_tasks --model tokenformer --model_args pretrained=FOLDER --tasks lambada_openai
"""

from __future__ import annotations

import sys

from eval_tasks.faults import is_of_options
from megatron.errors import UserError, run_command


def main() -> None:
    """Register the model, then do what lm_eval does."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError("lm_eval is not installed; pip install -r requirements/requirements-eval.txt") from error
    import eval_tasks.adapter  # noqa: F401  (registers "tokenformer")

    try:
        cli_evaluate()
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, UserError) or not is_of_options(error):
            raise
        raise UserError(f"lm_eval: {error}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
