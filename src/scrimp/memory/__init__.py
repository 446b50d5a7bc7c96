"""Memory: what a run will need, and what it was seen to hold."""
