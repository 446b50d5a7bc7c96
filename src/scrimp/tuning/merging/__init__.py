"""Several adapters into one, and one made small."""
