"""Stage train-base: VAE first, then U-Net and text encoder on its latents."""

from __future__ import annotations

from difflora_core.errors import BadConfig

from .. import parallel
from ..config import Config
from ..run_folder import RunFolder
from .unet_training import train_unet
from .vae_training import train_vae

PARTS = {"vae": train_vae, "unet": train_unet}


def run(config: Config, folder: RunFolder) -> None:
    if parallel.count() > 1 and tuple(config.base.only) != ("unet",):
        raise BadConfig("Only the U-Net trains in several processes; set base.only=[unet].")
    for name in config.base.only:
        if name not in PARTS:
            raise BadConfig(f"base.only names {name!r}; the parts are {', '.join(PARTS)}.")
        PARTS[name](config, folder)
