"""Sweeps: directions × hooks × coefficients × seeds in one engine, with controls, resumable."""
