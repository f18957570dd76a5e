"""The heart: static buffers, graph keys, capture, and the one place that decides how a step runs.

Here will stand the rolling store (``store.py``), the shadow capture (``capturer.py``) and the device-side loop
(``loop.py``); until then ``runner`` keeps the graphs captured at start in a plain mapping.
"""
