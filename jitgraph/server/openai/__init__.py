"""OpenAI's HTTP interface: records, caps, conversions, streams of events. No torch."""
