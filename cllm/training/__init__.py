"""Packing and masks, losses, optimiser, loop, checkpoints."""
