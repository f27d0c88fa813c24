"""Tests of ``sku.evaluate``."""
