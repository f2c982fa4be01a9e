"""File formats of a released adapter: diffusers', and kohya's for ComfyUI, A1111, Forge, kohya and InvokeAI; and the check of both."""


class FormatError(Exception):
    """A file that some program would load partly or wrongly, or an adapter that a format cannot represent."""
