"""Tests of sku.losses."""
