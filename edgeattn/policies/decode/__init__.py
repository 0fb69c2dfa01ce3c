"""Policies that choose what a decode step reads."""
