"""The bundled model: a trained, very small SDXL that generates coloured shapes."""
