"""Data: from files and hub datasets to forget and retain examples, splits and token ids."""
