"""Triton kernels: their modules need triton, and launches a GPU or Triton's interpreter."""
