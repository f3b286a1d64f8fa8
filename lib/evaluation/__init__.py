"""A model and text in, what it is worth out: perplexity on token windows (perplexity.py)."""
