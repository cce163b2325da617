"""Judging a model: text and tokens, scoring, statistics, comparison, gates.

Import the modules themselves (``loadstone.evaluation.run``): nothing is imported here, so that the command
line can reach the light ones (gates, protocol) without torch.
"""
