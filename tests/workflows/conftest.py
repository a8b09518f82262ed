"""What the workflows' tests share."""

from on_this_machine import act

__all__ = ["act"]
