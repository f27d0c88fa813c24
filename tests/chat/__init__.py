"""Tests of ``sku.chat``."""
