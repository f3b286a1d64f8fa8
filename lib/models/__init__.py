"""The only room that knows Hugging Face: where a model is, how it runs, where its weights go.

In: a folder or a name on the hub (loading.py), a device, a dtype, and how much memory there is (memory.py).
Out: a model as head - blocks - tail, in memory or read block by block from its files (decoder.py); the order of its blocks
(block_order.py), what they receive besides hidden states (block_arguments.py), and the weights in them that can be pruned
(matrices.py). checks.py says which models are refused. The room inside, files/, knows the files of a model.
"""
