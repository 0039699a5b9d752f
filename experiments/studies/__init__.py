"""The studies: one question each, answered by one command, one figure and its numbers."""
