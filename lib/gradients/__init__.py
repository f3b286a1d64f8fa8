"""A dense model and calibration windows in, a folder with the l1 and l2 norm of every weight's gradient out.

backward.py sends samples through the blocks and back, walk.py in groups; sums.py adds up their gradients, resume.py keeps
unfinished sums on disk, folder.py writes and reads the result: `lib.pruning` is given the norms it reads, and nothing else
passes between the two.
"""
