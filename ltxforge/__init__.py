"""ltxforge: a declarative LoRA trainer for Lightricks' video models."""

__version__ = "0.1.0"
