"""What a machine lacks to train: ``wmtp-ds doctor``."""
