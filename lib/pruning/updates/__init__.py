"""Beyond the paper: what becomes of the weights that stay.

recipe.py says which update follows a mask: SparseGPT's (sparsegpt.py) or least squares (least_squares.py), in stages (admm.py),
towards what (asymmetric.py), in which precision (precision.py). reconstruction.py then trains a block. All but the last are
functions on tensors alone.
"""
