"""What stage programs share: spec, manifest, reporter, signals, webhooks."""
