"""What launchers and stages say to each other: specs and manifests, progress, the signal to stop, errors."""
