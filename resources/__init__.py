"""What is injected into the assets: where stages run, on what hardware, where values lie, and the services outside."""
