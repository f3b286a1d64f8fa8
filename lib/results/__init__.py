"""What a run leaves behind, and what many runs say together.

In: what a run has measured (record.py), its seconds and memory (phases.py), or the files of many runs (read.py). Out:
results.json, log.txt, tables (tables.py), a model card (card.py), figures (figures.py), of
which errors_left.py leaves out what is not defined.
"""
