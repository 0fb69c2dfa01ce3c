"""The edgeattn command: one file a verb."""
