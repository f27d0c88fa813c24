"""Tests of what is made to be shared: model cards, and the upload."""
