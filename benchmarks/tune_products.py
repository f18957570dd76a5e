"""Measures cuBLASLt's algorithms for a model's products on this GPU, for the tables that come with the package:
``python benchmarks/tune_products.py --output jitgraph/assets/products/NAME.json [--model llama-2-7b] [--every 32]``.

It is the search that a start does on a device without a table, but at more token counts, and with the project's own
kernel against the library up to 128 tokens (``tune_parts/tiles.py``). Nothing else may run on the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main() -> int:
    """Command entry; works without an installed package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="the table to write, a JSON file")
    parser.add_argument("--model", default="llama-2-7b", help="preset whose shapes are measured (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--every", type=int, default=32, help="tokens between two searches (default: %(default)s)")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from tune_parts.tiles import Search, Wanted

    from jitgraph.engine.allocate import product_matrices
    from jitgraph.model.loader import load_model
    from jitgraph.model.weights import ModelWeights
    from jitgraph.ops.known_products import table
    from jitgraph.ops.linear import SKINNY_TOKENS
    from jitgraph.ops.products import TUNED_TOKENS, WORKSPACE_BYTES, TunedProducts, Tuning, tuned_points
    from jitgraph.ops.reference_linear import Use

    if not torch.cuda.is_available():
        print("Error: there is no CUDA device to measure on.", file=sys.stderr)
        return 2
    begin = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 2 or done == total:
            last = time.monotonic()
            print(f"  {done} of {total}, {last - begin:.0f} s", flush=True)

    with torch.inference_mode():
        loaded = load_model(options.model, device="cuda", dtype=options.dtype, weights="random")
        assert isinstance(loaded.weights, ModelWeights)
        matrices = product_matrices(loaded.weights)
        points = tuned_points(SKINNY_TOKENS + 1, TUNED_TOKENS)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        tuning = Tuning(matrices, points, workspace)
        codes = tuning.measure(progress, options.every)
        tuned = TunedProducts(dict(tuning.choices(codes, points[0])), {}, workspace)
        layers = loaded.weights.layers
        wanted = [
            Wanted([layer.qkv for layer in layers], Use.PLAIN),
            Wanted([layer.o for layer in layers], Use.ADD),
            Wanted([layer.gate_up for layer in layers], Use.GATED),
            Wanted([layer.down for layer in layers], Use.ADD),
        ]
        codes |= Search(tuned, points, lambda text: print(text, flush=True)).run(wanted)
    options.output.write_text(table(tuning.where, matrices, points, codes), encoding="utf-8")
    print(f"{options.output}: {len(codes)} of {len(matrices) * len(points)} products beat torch, {tuning.where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
