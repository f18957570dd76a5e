"""``python -m jitgraph`` is the command line."""

from jitgraph.cli import main

if __name__ == "__main__":
    main()
