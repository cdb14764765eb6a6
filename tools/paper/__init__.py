"""The paper's tables and figures, each with this program's own numbers beside the published ones; see docs/paper.md."""
