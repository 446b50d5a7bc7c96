"""Adapters that peft has, as peft builds them."""
