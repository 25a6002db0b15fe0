"""Text-driven editing of long videos with pretrained image diffusion models."""

__version__ = "0.1.0"
