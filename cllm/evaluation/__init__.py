"""Teacher and CLLM on the same held-out prompts: quality, tokens per forward, speed. Pure library code, no cluster."""
