"""What data may look like: a file a format, and how a table is read and taken for one of them."""
