"""From prompts to replies: ``prompts`` become token ids, ``backends`` write on from them, ``replies`` are recorded."""
