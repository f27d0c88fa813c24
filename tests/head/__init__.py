"""Tests of sku.head."""
