"""The network: crops become features, the router picks a granularity, the language model reads the chosen tokens."""
