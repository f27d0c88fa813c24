"""Many methods, seeds and variants on the same data, each a ``sku run`` of its own."""
