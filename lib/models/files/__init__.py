"""A model's folder in, its tensors and a pruned copy of it out.

fetch.py and hub.py bring the folder to this machine. checkpoint.py reads its tensors, and conversion.py gives them the names
that they have in the model. pruned_checkpoint.py writes a pruned copy of the folder, in which safetensors_file.py overwrites
single tensors. writer.py decides where the pruned blocks of a run go: to such a copy, or to temporary files.
"""
