"""Ablations: many students of one run, and which of its settings matter."""
