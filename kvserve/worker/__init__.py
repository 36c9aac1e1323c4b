"""One process, one model, one context: everything that touches llama.cpp and untrusted input.

`python -m kvserve.worker` is the real one, `python -m kvserve.worker.fake` a scripted one.
"""
