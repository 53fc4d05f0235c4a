"""Benchmarks: speed and memory beside a peer, both sides measured in one run, alternating."""
