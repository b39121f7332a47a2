"""Import-only stand-in: there is no CPU build of torchvision for the light environment, and nothing here calls it."""

from torchvision import io, transforms

__version__ = "0.0"
__all__ = ["io", "transforms"]
