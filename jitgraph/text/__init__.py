"""Text and token ids: tokenizers, chat templates, incremental text. No torch; shared with a server."""
