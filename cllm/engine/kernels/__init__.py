"""Triton kernels. Importing a module of this package needs triton; launching a kernel needs a GPU or Triton's interpreter."""
