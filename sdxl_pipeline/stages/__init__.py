"""The device stages: programs that read one spec and write one manifest."""
