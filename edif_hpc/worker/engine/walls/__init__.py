"""The walls around an executor: what puts them up, what tries them, and what watches what they cannot stop."""
