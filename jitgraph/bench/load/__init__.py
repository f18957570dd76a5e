"""A load generator for servers that speak OpenAI's interface: ``jitgraph bench serve URL``. No torch."""
