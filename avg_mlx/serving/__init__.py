"""Many clients and one model: an engine that answers them together, and an HTTP server in OpenAI's shape."""
