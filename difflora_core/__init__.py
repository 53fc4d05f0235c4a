"""DiffLoRA: identity LoRAs predicted from photos. This package knows nothing of any host."""

__version__ = "0.1.0"
