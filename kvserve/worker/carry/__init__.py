"""Carrying conversations from one worker to the next: export, transcode, import, prove.

`layout` and `cache_log` say how a context stores its rows, `structure` reads llama.cpp's sequence
state, `transcode` writes it in other KV types, `memory_file` holds it between two processes,
`sequence` moves it out of and into a context, `canary` compares what the model says next.
"""
