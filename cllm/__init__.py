"""Consistency large language models: trajectories, distillation, parallel decoding.

This package is the library. It imports torch, transformers and pyarrow, and never Ray, FastAPI, `jobs` or `serving`.
"""
