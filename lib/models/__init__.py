"""The only room that knows Hugging Face: where a model is, how it runs, where its weights go.

In: a folder or hub name (loading.py), a device, a dtype, how much memory there is (memory.py).
Out: a model as head - blocks - tail, in memory or read block by block from its files (decoder.py); the order of its blocks
(block_order.py), what they are given besides hidden states (block_arguments.py), the weights in them that can be pruned
(matrices.py). What a model has to be is in checks.py; its files are in the room inside, files/.
"""
