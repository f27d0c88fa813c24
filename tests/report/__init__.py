"""Tests of ``sku.report``."""
