"""Text in, token windows out.

readers.py  a file -> its documents, each a text or a conversation
sources.py  "c4", "wikitext2", a file, a folder or a pattern of files -> all their documents, mapped from disk
tokens.py   a document -> token ids
windows.py  documents -> calibration windows (n, T), and the token stream that perplexity is measured on
"""
