"""Tests of ``sku.attacks``."""
