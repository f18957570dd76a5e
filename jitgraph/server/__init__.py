"""The process in front of the engine: client, supervisor, HTTP. No torch."""
