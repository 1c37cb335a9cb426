"""The server's page in a real browser: `make test-page`."""
