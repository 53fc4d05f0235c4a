"""What guidance by a face network gains in likeness, and what it costs in everything else."""
