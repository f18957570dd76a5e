"""How an engine process and those who use it talk: messages, frames, sockets. No torch."""
