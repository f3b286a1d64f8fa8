"""Pruning of pretrained causal language models with gradients: the library behind main.py and gradient_computation.py."""
