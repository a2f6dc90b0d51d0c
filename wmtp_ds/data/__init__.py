"""Data: rows and how they are drawn and batched; problems, solutions, and labels earned by running them."""
