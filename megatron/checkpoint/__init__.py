"""Checkpoints in the canonical form, which knows no layout: reading, writing, folders, lock."""
