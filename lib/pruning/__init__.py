"""A dense model and calibration windows in, a pruned model out.

The loop (prune.py) goes from block to block: statistics of the inputs (activations.py), the score of every weight
(scores.py: the paper's formula), the mask (masks.py), for SparseGPT an update of what remains (sparsegpt.py). selection.py
says which linears, and how much of each. Scores, masks and SparseGPT's solver are functions on tensors alone.
"""
