"""The chat page that `edgeattn serve` shows: its routes, and in page/ what a browser loads."""
