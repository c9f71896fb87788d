"""The embedded base: a small Stable Diffusion, its concepts, and how it was made."""
