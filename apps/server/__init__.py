"""The server of `edgeattn serve`: an engine that computes many answers at once, and OpenAI's routes over it."""
