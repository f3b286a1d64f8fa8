"""GBLM-Pruner's library, in rooms: data, models, gradients, pruning, evaluation; what all of them use is beside this file.

    data -> (n, T) token windows -> models: head - blocks - tail -> gradients -> a folder of norms
                                                                 -> pruning (scores.py holds the paper's formula) -> evaluation

Imports go one way: pruning, gradients and evaluation see models, models see none of them, and none of the three sees another.
"""
