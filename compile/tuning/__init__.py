"""Measurements: clocks for calls on the host and on a GPU, and the limits of a machine."""
