"""The HTTP side: a Ray Serve application that hosts models behind an OpenAI-compatible API."""
