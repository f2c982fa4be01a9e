"""What is injected into the assets: where stages run, on what hardware, where values are stored, and external services."""
