"""The embedded world: invented hazards, their harmless neighbours, and a tiny model that knows both.

Nothing in it is real. It exists so that the whole method runs, is judged exactly and is tested, on a laptop,
offline, without one harmful word.
"""
