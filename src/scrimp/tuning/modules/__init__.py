"""Adapters beside and between the layers."""
