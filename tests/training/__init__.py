"""Tests of sku.training."""
