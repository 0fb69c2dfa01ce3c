"""Sparse-attention and KV-compression methods, one file each."""
