"""Stage 2, knowledge negation: the task vector and its subtraction.

A weight's way from checkpoint to shard: ``model_files`` (index), ``files``, ``matching``, ``streaming``,
``arithmetic``, ``storage``; and ``adapters`` where its change lies in one.
"""
