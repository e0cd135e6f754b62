"""Measurements of engines against each other and against the hardware."""
