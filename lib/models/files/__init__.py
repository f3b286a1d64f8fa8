"""A model's folder: fetched (fetch.py, hub.py), its tensors read (checkpoint.py) under the model's names (conversion.py), and a
pruned copy of it written (pruned_checkpoint.py), in place in files like its own (safetensors_file.py).
"""
