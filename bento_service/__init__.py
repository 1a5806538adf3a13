"""TRL Remote Training Service: preference training with TRL behind BentoML."""

__version__ = "0.1.0"
