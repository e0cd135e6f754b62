"""The step, AR and Jacobi decoding, sampling, trajectories."""
