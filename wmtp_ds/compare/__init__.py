"""Which of several runs is better, by how much, and what is different about them. Imports no torch."""
