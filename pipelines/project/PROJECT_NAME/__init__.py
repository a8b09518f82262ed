"""What our notebooks share."""

__version__ = "0.1.0"
