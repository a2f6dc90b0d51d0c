"""How good a model is: problems solved, and how well it predicts solutions that are right."""
