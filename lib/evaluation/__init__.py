"""A model and text in, a measure of the model's quality out.

Perplexity on windows of tokens is measured by perplexity.py. dense_cache.py stores the perplexities of dense models for later
runs. zero_shot.py measures accuracy on tasks, through lm-evaluation-harness (harness.py).
"""
