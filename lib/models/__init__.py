"""The only room that knows Hugging Face: where a model is, how it runs, where its weights go.

In: a folder or hub name (loading.py), a device, a dtype, how much memory there is (memory.py).
Out: a model as head - blocks - tail, in memory or read block by block from its files (decoder.py); pruned blocks as a
checkpoint that loads anywhere (checkpoint.py).
"""
