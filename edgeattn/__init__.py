"""edgeattn: an on-device inference runtime for quantised sparse attention."""
__version__ = "0.1.0"
