"""GBLM-Pruner's library, in rooms; a folder's own docstring says what comes in and what goes out.

    data -> (n, T) token windows -> models: head - blocks - tail -> gradients -> a folder of norms
                                                                 -> pruning: the paper; pruning.updates: beyond it
                                                                 -> evaluation -> results
    cli: flags to values, at the beginning of every command

Imports go one way: pruning, gradients and evaluation see models, models see none of them, and none of the three sees another.
Outside the rooms: parallel.py, several processes as one; atomic.py, files that are whole or not there; errors.py, what is refused.
"""
