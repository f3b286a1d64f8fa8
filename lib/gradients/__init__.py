"""A dense model and calibration windows in, a folder with the l1 and l2 norm of every weight's gradient out.

walk.py goes over the samples in groups, and backward.py sends a group through the blocks and back. sums.py adds up the
gradients, resume.py stores unfinished sums on disk, and folder.py writes and reads the result. The norms that folder.py reads
are all that passes from here to `lib.pruning`.
"""
