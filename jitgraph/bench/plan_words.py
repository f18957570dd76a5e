"""What the command line's words mean: cases, lengths, cores, and the pairs of ``--python`` and ``--url``. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from jitgraph.bench.plan import ALL_CASES, GROUPS, require
from jitgraph.errors import ConfigError


def parse_cases(names: Iterable[str]) -> tuple[str, ...]:
    """Cases in table order from what the command line was given; nothing means ``all``, which is the five.

    Raises:
        ConfigError: a name that is neither a case nor one of ``GROUPS``.
    """
    given = set(names) or {"all"}
    unknown = sorted(given - set(ALL_CASES) - set(GROUPS))
    known = f"{', '.join(ALL_CASES)}, all (the first five), ablation or peers"
    require(not unknown, f"unknown case {', '.join(unknown)}: choose from {known}")
    wanted = {case for name in given for case in GROUPS.get(name, (name,))}
    return tuple(case for case in ALL_CASES if case in wanted)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Prompt lengths from ``10,100``.

    Raises:
        ConfigError: not a list of whole numbers.
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise ConfigError(
            f"prompt-lengths must be whole numbers with commas between them, such as 10,100, not {text!r}"
        ) from None


def parse_cpus(text: str | None) -> tuple[int, ...]:
    """Cores from ``2-5,8``; none from nothing.

    Raises:
        ConfigError: not a list of cores.
    """
    if text is None:
        return ()
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise ConfigError(f"--pin-cpu wants cores such as 2-5,8, not {text!r}") from None
    require(bool(found), f"--pin-cpu wants cores such as 2-5,8, not {text!r}")
    return tuple(sorted(found))


def parse_pythons(entries: Iterable[str]) -> dict[str, str]:
    """Interpreter of each case from ``case=PATH`` entries.

    Raises:
        ConfigError: an entry without a ``=``.
    """
    return _pairs(entries, "--python wants case=PATH, such as tensorrt-llm=.venv-trt/bin/python")


def parse_urls(entries: Iterable[str]) -> dict[str, str]:
    """Server of each case from ``case=URL`` entries.

    Raises:
        ConfigError: an entry without a ``=``.
    """
    return _pairs(entries, "--url wants case=URL, such as vllm=http://127.0.0.1:8000")


def _pairs(entries: Iterable[str], wanted: str) -> dict[str, str]:
    found = {}
    for entry in entries:
        case, equals, value = entry.partition("=")
        require(bool(equals and value), f"{wanted}, not {entry!r}")
        found[case] = value
    return found
