"""What a process of its own costs, taken over from a record of ``benchmarks/ipc.py``: that needs a quiet machine with a
GPU, and has a definition of its own.
"""

from __future__ import annotations

import json
from typing import Any

from ipc import figures

from jitgraph.errors import ConfigError
from reliability_parts.lab import Lab, Part


def ipc(lab: Lab) -> Part:
    """The figures of the record, from its raw samples, with its own device and model.

    Raises:
        ConfigError: there is no such record.
    """
    path = lab.ipc_record
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = figures(raw)
        part = raw[found["figures_from"]]
        counts = {name: len(values) for name, values in part["samples"].items()}
        where = {"device": raw["environment"]["device"], "measured_on": raw["environment"]["device_name"]}
        where["model"] = part["conditions"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no raw record of benchmarks/ipc.py: run it with --output FOLDER and give "
            f"--ipc-record FOLDER/raw/ipc.json ({error})"
        ) from None
    about = {"figures_from": found["figures_from"], "samples": counts, "conditions": part["conditions"]}
    return Part(found["figures"], {**where, **about})
