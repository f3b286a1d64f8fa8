"""A dense model and calibration windows in, a pruned model out.

The loop (prune.py) goes from block to block: statistics of the inputs (statistics.py, activations.py), the score of every
weight (scores.py: the paper's formula), the mask (masks.py). What remains may be updated (update.py says how: sparsegpt.py,
least_squares.py, admm.py; towards what: asymmetric.py) and the block trained (reconstruction.py). selection.py says which
linears, and how much of each; ratios.py how much of each block. Scores, masks and solvers are functions on tensors alone.
"""
