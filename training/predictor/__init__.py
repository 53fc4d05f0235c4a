"""The predictor's training: LoRA autoencoder, denoiser, end-to-end stage, calibration."""
