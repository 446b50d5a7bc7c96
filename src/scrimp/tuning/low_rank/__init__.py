"""Changes of low rank that peft lacks."""
