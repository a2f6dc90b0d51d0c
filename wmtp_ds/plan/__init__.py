"""``wmtp-ds plan``: the memory that a config takes, by arithmetic alone. Nothing here imports torch."""
