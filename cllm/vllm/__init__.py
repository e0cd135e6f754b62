"""vLLM as a peer: its AR and speculative decoding behind the interface of our engine, and Jacobi decoding inside it."""
