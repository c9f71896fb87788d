"""Optimizers, their settings, averages of the weights."""
