"""Weights in and out: the Orbax export."""
