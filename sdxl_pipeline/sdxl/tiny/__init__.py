"""The bundled tiny SDXL: the world it lives in, the trainings that made it, and its weights."""
