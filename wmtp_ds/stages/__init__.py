"""The stages: one short file each, with what differs from the others and nothing else."""
