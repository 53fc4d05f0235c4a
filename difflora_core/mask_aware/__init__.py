"""Losses on faces and people inside masks, and sampling that follows their gradient."""
