"""Checks the nodes that a configuration would run on, before a job does: `python deepy.py doctor CONFIG.yml`.

What runs on a node first needs the standard library only, so that a node without torch can still say so.
"""
