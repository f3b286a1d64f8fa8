"""A model's folder: fetched (fetch.py, hub.py), its tensors read (checkpoint.py) under the model's names (conversion.py), and a
pruned copy of it written (pruned_checkpoint.py, safetensors_file.py), or what a run needs of one (writer.py).
"""
