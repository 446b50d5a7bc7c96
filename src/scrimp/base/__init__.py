"""What every part shares; it needs torch at the most."""
