"""Runtime of the stage programs: specs, manifests, reporter, signals, webhooks."""
