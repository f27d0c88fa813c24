"""Stage 2. A weight's way from checkpoint to shard: ``model_files`` (index), ``files``, ``matching``, ``streaming``,
``arithmetic``, ``storage``; and ``adapters`` where its change lies in one.
"""
