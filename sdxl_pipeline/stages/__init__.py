"""The device stages: programs that read a spec and write a manifest."""
