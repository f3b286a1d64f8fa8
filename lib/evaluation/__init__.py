"""A model and text in, what it is worth out: perplexity on windows of tokens (perplexity.py), of dense models as an earlier run has
kept it (dense_cache.py); accuracy on tasks (zero_shot.py, through lm-evaluation-harness: harness.py).
"""
