"""Stage 2, knowledge negation: the task vector and its subtraction."""
