"""The Jacobi engine: continuous batching over a paged cache, one decoding step for AR and Jacobi alike."""
