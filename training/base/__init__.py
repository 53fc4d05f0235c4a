"""The mini text-to-image model: VAE, text encoder, U-Net, and the painter that samples it."""
