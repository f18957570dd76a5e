"""Parts *ceiling*, *ttft*, *decode* and *tails*: how fast a request is, against what the machine's products take, and
how evenly. The engine is the one that users get, with a graph for each of the benchmark's lengths.
"""

from __future__ import annotations

from jitgraph import LLM
from jitgraph.bench.ceiling import LinearsGraph, measure_rates
from runtime_parts import inside
from runtime_parts.lab import Lab, Result


def ceiling(lab: Lab) -> Result:
    """Rates of the machine, without an engine."""
    lab.close()
    return Result(samples=measure_rates(lab.plan, lambda: None))


def ttft(lab: Lab) -> Result:
    """TTFT and the matrix products of the same length in turns, so that what drifts drifts in both."""
    llm, scale = lab.headline_llm(), lab.scale
    weights = inside.linear_matrices(llm)
    client: dict[str, list[float]] = {}
    products: dict[str, list[float]] = {}
    count = lab.counting("requests", len(scale.lengths) * scale.ttft_requests)
    llm.reset_stats()
    for length in scale.lengths:
        prompt, graph = lab.ids(length), LinearsGraph(weights, length)
        lab.warm(llm, prompt, tokens=1)
        client[str(length)], products[str(length)] = [], []
        for _ in range(scale.ttft_requests):
            lab.pause()
            products[str(length)].append(graph.replay_ms())
            lab.pause()
            client[str(length)].append(lab.first_token_ms(llm, prompt))
            count.step()
        graph.close()
    stats = llm.stats()
    return Result(
        samples={"client": client, "linears": products},
        counters={name: stats[name] for name in ("prefill_paths", "compiles_after_ready")},
        conditions={"requests_per_length": scale.ttft_requests, "engine": llm.describe()},
    )


def decode(lab: Lab) -> Result:
    """The time between tokens over a range of contexts, and the products of one token before each stream."""
    llm, scale = lab.headline_llm(), lab.scale
    graph = LinearsGraph(inside.linear_matrices(llm), 1)
    gaps: dict[str, list[list[float]]] = {str(prompt): [] for prompt, _ in scale.decode_spans}
    products: list[float] = []
    replays = -(-scale.ttft_requests // (scale.decode_rounds * len(scale.decode_spans)))
    count = lab.counting("streams", scale.decode_rounds * len(scale.decode_spans))
    lab.warm(llm, lab.ids(scale.decode_spans[0][0]))
    llm.reset_stats()
    for _ in range(scale.decode_rounds):
        for prompt, tokens in scale.decode_spans:
            for _ in range(replays):
                lab.pause()
                products.append(graph.replay_ms())
            lab.pause()
            gaps[str(prompt)].append(lab.token_gaps_ms(llm, lab.ids(prompt), tokens))
            count.step()
    graph.close()
    stats = llm.stats()
    return Result(
        samples={"gaps": gaps, "linears_1": products},
        counters={name: stats[name] for name in ("decode_paths", "loops", "compiles_after_ready")},
        conditions={"spans": [list(span) for span in scale.decode_spans], "rounds": scale.decode_rounds},
    )


def tails(lab: Lab) -> Result:
    """Many requests of one length, then many tokens: short streams, each after a pause, and only the gaps inside."""
    scale = lab.scale
    client, gaps = tail_samples(lab, lab.headline_llm())
    return Result(
        samples={"client": client, "gaps": gaps},
        conditions={
            "ttft_prompt_tokens": scale.tail_prompt,
            "itl_contexts": [scale.itl_prompt, scale.itl_prompt + scale.itl_tokens],
        },
    )


def tail_samples(lab: Lab, llm: LLM) -> tuple[list[float], list[list[float]]]:
    """TTFT of each request, and the gaps of each stream, of any engine."""
    scale = lab.scale
    prompt = lab.ids(scale.tail_prompt)
    lab.warm(llm, prompt)
    count = lab.counting("requests", scale.tail_requests)
    client = []
    for _ in range(scale.tail_requests):
        lab.pause()
        client.append(lab.first_token_ms(llm, prompt))
        count.step()
    prompt = lab.ids(scale.itl_prompt)
    lab.warm(llm, prompt)
    count = lab.counting("streams", scale.itl_streams)
    gaps = []
    for _ in range(scale.itl_streams):
        lab.pause()
        gaps.append(lab.token_gaps_ms(llm, prompt, scale.itl_tokens))
        count.step()
    return client, gaps
