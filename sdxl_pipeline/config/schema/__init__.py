"""Settings models: one module per section of config.json, and the entries of multidatabackend.json."""
