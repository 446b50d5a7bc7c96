"""LoRA whose gradients are changed before the step."""
