"""One GPU's engine: who runs when (``scheduler``), how a step is launched (``runner``), and the loop (``engine``)."""
