"""Models of other layouts in, and out again: one tensor at a time, a block of rows at a time."""
