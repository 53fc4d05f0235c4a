"""Training and evaluation stages: `python -m training STAGE --config X.toml [key=value ...]`."""
