"""The only room that knows Hugging Face: where a model is, how it runs, where its weights go.

In: a folder or hub name (loading.py), a device, a dtype, how much memory there is (memory.py).
Out: a model as head - blocks - tail, in memory or read block by block from its files (decoder.py); the tensors of its files
(checkpoint.py), under the model's names (conversion.py); a pruned copy of its folder that loads anywhere (store.py).
"""
