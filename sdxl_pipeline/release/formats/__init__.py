"""File formats of a released adapter: diffusers', kohya's for ComfyUI, A1111, Forge, kohya and InvokeAI, and the check of both."""


class FormatError(Exception):
    """A file that some reader would load in part or wrongly, or an adapter that a format cannot hold."""
