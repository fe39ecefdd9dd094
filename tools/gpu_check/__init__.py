"""Tests and measures the CUDA target on this machine's GPU; stages.py says how."""
