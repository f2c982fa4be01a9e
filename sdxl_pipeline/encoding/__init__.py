"""Images through the VAE and captions through the text encoders, into the stores."""
