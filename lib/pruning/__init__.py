"""The paper: a dense model and calibration windows in, a pruned model out.

The loop (prune.py) goes from block to block: statistics of the inputs (statistics.py, of samples in streams.py), the score of
every weight (scores.py: the paper's formula; methods.py: the table of methods), the mask (masks.py). What a block has come to is
outcome.py. targets.py says how much to remove where, search.py finds a flag's value. Beyond the paper, what remains may be
updated: updates/. Scores, masks and solvers are functions on tensors alone.
"""
