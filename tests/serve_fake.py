"""A front-end process before stand-ins for engines: ``python tests/serve_fake.py [options] [-- engine's options]``.

As ``jitgraph serve``, but for the engine's command and limits that suit tests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jitgraph.server.serve import ServeOptions, serve
from jitgraph.server.supervisor_policy import Limits

FAKE = str(Path(__file__).with_name("fake_engine.py"))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hang-s", type=float, default=1.0)
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("engine", nargs="*")
    options = parser.parse_args()
    command = (sys.executable, FAKE, *options.engine)
    return serve(
        ServeOptions(
            model="fake",
            commands=(command,) * options.engines,
            port=0,
            shutdown_timeout_s=options.shutdown_timeout,
            limits=Limits(hang_s=options.hang_s, grace_s=0.5, tick_s=0.05),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
