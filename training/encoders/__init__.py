"""The mini world's encoders: face detector, recognisers, image-text model, attribute heads."""
