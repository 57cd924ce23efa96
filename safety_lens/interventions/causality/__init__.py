"""Causal selection: what a direction does to the behaviour when it is removed and when it is added."""
