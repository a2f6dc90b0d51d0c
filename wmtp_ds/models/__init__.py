"""The policy, its value head, and their way in and out of files."""
