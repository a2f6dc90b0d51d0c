"""What all operations agree on."""

# The target of a row from which there is nothing to learn, as in torch.
IGNORE_INDEX = -100
