"""Activations: what the backward pass keeps, and the loss at its end."""
