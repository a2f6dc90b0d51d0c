"""What a method looks at: the weight of every token of some solutions, and what it comes from."""
