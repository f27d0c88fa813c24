"""Tests of ``sku.sharing``."""
