"""What measures the training step: ``wmtp-ds bench step``."""
