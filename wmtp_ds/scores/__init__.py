"""What a frozen reference model says of the tokens of a data file, computed once and read while training."""
