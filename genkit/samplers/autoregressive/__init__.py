"""Sampling from autoregressive networks."""
