"""The optimizers proper: how a gradient, in whatever space, becomes a direction."""
